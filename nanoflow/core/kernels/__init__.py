"""Triton kernels. `register` says which operation of `core.ops` each does on a GPU; importing the others needs Triton.

The plain PyTorch function of an operation is the specification of its kernel.
"""
