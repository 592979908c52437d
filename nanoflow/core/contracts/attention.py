"""The contract of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from nanoflow.core.data.attention_input import AttentionInput, Projection

if TYPE_CHECKING:
    import torch


class AttentionBackend(ABC):
    """Stores keys and values in a paged cache of its own layout, and attends over it.

    Attributes:
        capturable: whether steps in which every sequence decodes may be captured in a CUDA graph. `plan` is then called
            within the capture, for tensors whose content changes from replay to replay: what it works out on the device
            is captured too, and what it decides on the host must be right for whatever the tensors may hold.
        capturable_chunks: whether all other steps may, too.
    """

    capturable: bool = False
    capturable_chunks: bool = False

    @property
    @abstractmethod
    def bytes_per_block(self) -> int:
        """Bytes that one block takes over all layers; the engine sizes the cache with it."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """Make the cache. Called once. Its content must be finite, for what padding of captured steps may see."""

    @abstractmethod
    def plan(self, inputs: AttentionInput) -> None:
        """Prepare for one step; called once before its layers. What depends on the batch alone is worked out here.

        Device work must be done when the first layer's `attend` starts, so a kernel launched here must not overlap with
        those of the layers.
        """

    @abstractmethod
    def cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `layer`, each as a [B, P, K, H] view, for kernels that store into it themselves."""

    @property
    @abstractmethod
    def slot_mapping_T(self) -> torch.Tensor:
        """The planned step's `AttentionInput.slot_mapping_T`."""

    @abstractmethod
    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        """Attend causally over each sequence's context in the cache, in which this step's tokens are stored already,
        and within the layer's window if it has one (`AttentionContext.windows`).

        What is no part of a sequence's context may be another one's, and NaN; a weight of 0 does not silence that.

        Returns [T, N, H] in the query's dtype. The query may be a view with strides; its last dim is contiguous.
        """

    def store(self, layer: int, key_TKH: torch.Tensor, value_TKH: torch.Tensor) -> None:
        """Store the whole batch's keys and values of `layer`. Arguments may be views, as in `attend`."""
        slots, size = self.slot_mapping_T, self.cache(layer)[0].shape[1]
        for cache, new in zip(self.cache(layer), (key_TKH, value_TKH), strict=True):
            cache[slots // size, slots % size] = new

    def project_and_attend(self, layer: int, projection: Projection) -> torch.Tensor | None:
        """Norm, rotate, `store` and `attend` in one, [T, N, H]; None where there is no such way for the planned step.

        Only a step that is `AttentionInput.uniform_decode` may do it sequence by sequence.
        """
        return None

    def forward(
        self, layer: int, query_TNH: torch.Tensor, key_TKH: torch.Tensor, value_TKH: torch.Tensor
    ) -> torch.Tensor:
        """`store`, then `attend`.

        Storing comes first for the whole batch: a sequence may share blocks that another one fills in this same step.
        """
        self.store(layer, key_TKH, value_TKH)
        return self.attend(layer, query_TNH)
