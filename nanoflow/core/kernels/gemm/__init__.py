"""GEMM for few rows: GEMV, skinny, tiled and TMA kernels, and which of them serves which shape."""
