"""The version of nanoflow."""

__version__ = "0.1.0"
