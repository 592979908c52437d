"""Each Triton kernel against the plain PyTorch of its operation."""
