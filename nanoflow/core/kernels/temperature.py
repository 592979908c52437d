"""Logits over temperature, as sampling and its filters take them."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_TEMPERATURE = tl.constexpr(1e-10)  # as in `core.ops.sampling`


@triton.jit
def scaled(logits, temperature):
    """logits / temperature, up to the last bit, for a tenth of the work."""
    return logits.to(tl.float32) * (1.0 / tl.maximum(temperature, LOWEST_TEMPERATURE))
