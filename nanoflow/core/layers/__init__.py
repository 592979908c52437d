"""Building blocks that models share. Each layer says in `weights` which checkpoint tensors it is made of."""

from nanoflow.core.layers.embedding import Embedding
from nanoflow.core.layers.linear import Linear
from nanoflow.core.layers.norm import RMSNorm
from nanoflow.core.layers.rotary import RotaryEmbedding, apply_rotary

__all__ = ["Embedding", "Linear", "RMSNorm", "RotaryEmbedding", "apply_rotary"]
