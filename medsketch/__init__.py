__version__ = "0.1.0"


def __getattr__(name):
    "`medsketch.load`, imported when it is first asked for, so that `import medsketch` stays quick"
    if name != 'load': raise AttributeError(f"module 'medsketch' has no attribute {name!r}")
    from .pretrained import load
    return load
