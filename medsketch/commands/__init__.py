"""The commands of the command line, by concept; `medsketch.cli` lists them."""
