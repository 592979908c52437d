"""The contract of a model architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.data.parallel import ParallelContext, Shard

if TYPE_CHECKING:
    import torch

    from nanoflow.core.ops import Ops


def _plain_ops() -> Ops:
    from nanoflow.core.ops import Ops  # which needs PyTorch

    return Ops()


@dataclass(frozen=True)
class ModelContext:
    """What a model is built from.

    Attributes:
        hf_config: the checkpoint's config.json.
        dtype: of parameters and activations.
        device: where parameters live.
        max_model_len: most tokens in a sequence.
        parallel: this rank among those that share the model; layers split themselves by it.
        ops: what layers compute with; by default plain PyTorch.
    """

    hf_config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    parallel: ParallelContext = field(default_factory=ParallelContext)
    ops: Ops = field(default_factory=_plain_ops)


class ModelArch(ABC):
    """A model: from token ids to hidden states to logits, and how checkpoint names map onto its parameters.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_dim, scale, windows: its attention shapes, as in `AttentionContext`,
            but with the heads of all ranks together.
        vocab_size: V, of all ranks together.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    windows: tuple[int | None, ...] = ()
    vocab_size: int

    @abstractmethod
    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        """Hidden states [T, D] after the last norm. `attention` is planned; call `attention.forward` once a layer."""

    @abstractmethod
    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the rows that sample.

        With several ranks [S, V / ranks], of this rank's part of the vocabulary, as `Embedding.logits` gives them.
        """

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor | Shard | None]:
        """Checkpoint name -> the parameter, or the view of a fused parameter, that it is copied into.

        A `Shard` holds a part of the checkpoint's tensor. None stands for a tensor that the checkpoint may hold and
        that this rank has no use for (a tied head).
        """
