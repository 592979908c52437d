"""What is installed: the name of the distribution, and the version."""

__version__ = "0.1.0"

DISTRIBUTION = "nanoflow-engine"  # `nanoflow`, as one imports it, is another project on the package index
