"""`attention=triton`: our own kernels, for any GPU that Triton serves."""
