"""Triton kernels of the layers and the sampler. Nothing here chooses: layers call them for tensors on a GPU.

The plain PyTorch twin of each kernel stands in the layer that calls it; it is the specification. Importing these
modules needs Triton, so layers import them where they use them.
"""
