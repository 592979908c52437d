"""What an attention backend is built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AttentionContext:
    """What an attention backend is built from: the model's attention shapes and where it runs.

    Attributes:
        num_layers: layers with attention, each with its own cache.
        num_heads: N, query heads of this rank.
        num_kv_heads: K, this rank's; a divisor of N.
        head_dim: H.
        scale: factor on the scores before softmax.
        block_size: P, tokens in a block.
        dtype: of queries, keys, values and the cache.
        device: where everything lives.
        windows: for each layer how many tokens, the last ones up to and with itself, a token attends to, None for all
            of them. Empty if there are no windows. A backend that knows none says so in `supports`.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    dtype: torch.dtype
    device: torch.device
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """The window of this layer."""
        return self.windows[layer] if self.windows else None

    @property
    def distinct_windows(self) -> set[int | None]:
        """The windows that layers have, each once; what depends on a window and the batch is planned once for each."""
        return set(self.windows or (None,))

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values of one block over all layers, in `dtype` and without anything beside them."""
        numbers = 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim
        return numbers * self.dtype.itemsize
