"""Each Triton kernel against its PyTorch twin."""
