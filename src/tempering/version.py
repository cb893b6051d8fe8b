"""The version of the package, read by everything that writes a file."""

__version__ = "0.2.0"
