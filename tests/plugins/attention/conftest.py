"""Kernels run in Triton's interpreter here where there is no GPU. Triton looks at the variable when it is imported."""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
