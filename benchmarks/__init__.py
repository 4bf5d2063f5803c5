"""Speed against stated targets: `python -m benchmarks [names]`, or `make bench`."""
