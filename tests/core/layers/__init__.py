"""The layers' PyTorch side, which is the specification of the kernels."""
