"""Train deep networks module by module through cached activations."""

__version__ = "0.1.0"
