"""Building blocks that models share. Each layer says in `weights` which checkpoint tensors it is made of."""

from nanoflow.core.layers.attention import attend
from nanoflow.core.layers.decoder import Attention, Decoder, DecoderLayer, FeedForward
from nanoflow.core.layers.embedding import Embedding
from nanoflow.core.layers.experts import Experts
from nanoflow.core.layers.linear import Linear
from nanoflow.core.layers.norm import RMSNorm
from nanoflow.core.layers.parallel_linear import ColumnParallelLinear, GatedLinear, QKVLinear, RowParallelLinear
from nanoflow.core.layers.partials import add_partials
from nanoflow.core.layers.rotary import RotaryEmbedding
from nanoflow.core.ops.attention import Rotation, apply_rotary

__all__ = [
    "Attention",
    "ColumnParallelLinear",
    "Decoder",
    "DecoderLayer",
    "Embedding",
    "Experts",
    "FeedForward",
    "GatedLinear",
    "Linear",
    "QKVLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "Rotation",
    "RowParallelLinear",
    "add_partials",
    "apply_rotary",
    "attend",
]
