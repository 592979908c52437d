"""The four roles that plugins fill, and how a plugin describes itself.

The docstrings are the specification. Shape suffixes are explained in `types.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanoflow.core.parallel import ParallelContext, Shard
from nanoflow.core.types import AttentionInput, Batch, Projection, Sequence

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NoOptions:
    """The config of a plugin that has no options."""


@dataclass(frozen=True)
class Component:
    """A plugin's description of itself, returned by one of the hooks in `hookspecs.py`. Making one must be cheap.

    Attributes:
        name: how configs name it (`attention=NAME`); unique in its role.
        build: `(config, context) -> object`, with an instance of `config` and the role's context (below). Heavy imports
            belong in here. May raise `ConfigError` or `PluginError`.
        config: dataclass of its options with their defaults; `core.config.option` adds the help line. A scheduler's
            derives from `core.config.SchedulerConfig`.
        available: None if it can be used on this machine, else one sentence that says why not and what would help
            ("the package flash-attn is not installed: pip install flash-attn"). Called for `nanoflow plugins` too.
        supports: attention backends only: None if it can serve this context, else the reason. Asked after `available`.
        priority: `auto` takes the highest that can serve; a negative one is never taken by `auto`.
        architectures: models only: the Hugging Face `architectures` that it serves.
        positions_key: models only: what config.json calls the most tokens in a sequence.
    """

    name: str
    build: Callable[[Any, Any], Any]
    config: type = NoOptions
    available: Callable[[], str | None] = lambda: None
    supports: Callable[[Any, Any], str | None] = lambda config, context: None
    priority: int = 0
    architectures: tuple[str, ...] = ()
    positions_key: str = "max_position_embeddings"


@dataclass(frozen=True)
class ModelContext:
    """What a model is built from.

    Attributes:
        hf_config: the checkpoint's config.json.
        dtype: of parameters and activations.
        device: where parameters live.
        max_model_len: most tokens in a sequence.
        parallel: this rank among those that share the model; layers split themselves by it.
    """

    hf_config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    parallel: ParallelContext = field(default_factory=ParallelContext)


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


@dataclass(frozen=True)
class BlockManagerContext:
    """What a block manager is built from: `num_blocks` blocks with ids from 0, of `block_size` tokens each."""

    num_blocks: int
    block_size: int


@dataclass(frozen=True)
class SchedulerContext:
    """What a scheduler is built from.

    Attributes:
        block_manager: the only way to blocks.
        max_model_len: most tokens in a sequence.
    """

    block_manager: BlockManager
    max_model_len: int


class BlockManager(ABC):
    """Owns the blocks of the KV cache: who has which, and which hold prefixes worth keeping.

    It deals in block ids and never touches the cache itself. The scheduler calls it, and nobody else.

    Attributes:
        num_blocks: blocks in all.
        block_size: P, tokens in a block.
        num_queried_tokens: tokens of admitted sequences that were looked up in the prefix cache.
        num_hit_tokens: how many of those were found.
    """

    num_blocks: int
    block_size: int
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` could hand out now, cached ones that nobody uses included."""

    @abstractmethod
    def match(self, sequence: Sequence) -> int:
        """How many leading tokens of `sequence` the cache holds: a multiple of P, at most
        `sequence.num_skippable_tokens`.

        The tokens after these are left to compute even if the cache holds them, since their logits are needed; the last
        one is always among them. Changes nothing that can be seen. 0 for a manager without a prefix cache.
        """

    @abstractmethod
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` blocks for its computed tokens and `num_tokens` more, or change nothing and return False.

        For a sequence without blocks this is admission: it first takes the blocks that `match` found, and sets
        `sequence.num_computed_tokens` to their tokens. Appends to `sequence.block_table`.
        """

    @abstractmethod
    def commit(self, sequence: Sequence) -> None:
        """Note that keys and values of `sequence`'s computed tokens are in its blocks, or will be before any step
        submitted later reads them. Full blocks whose token values are known may be shared from now on."""

    @abstractmethod
    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of `sequence`: empties its `block_table` and sets `num_computed_tokens` to 0.

        Blocks that were committed may be kept for later matches until they are needed.
        """


class Scheduler(ABC):
    """Decides who runs in the next step, how many tokens each, and who has to give way.

    It counts tokens and never looks at their values, so that a step can be planned before the previous one's tokens
    are known. The engine calls, in this order and from one thread: `add` and `abort` at any time between steps,
    `schedule` for each step, `update` once for each batch, in the order of the batches. With overlap, `schedule` for
    step n+1 comes before `update` for step n.

    Its config derives from `SchedulerConfig`. No batch has more than `max_num_seqs` sequences, no more than these hold
    blocks at a time, and no batch has more than its `budget` of tokens.
    """

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. The engine has checked that it fits into an empty cache."""

    @abstractmethod
    def abort(self, request_id: str) -> Sequence | None:
        """Forget an unfinished request and free its blocks before the next step; None if there is no such request.

        The engine calls `Sequence.finish` itself. A result still in flight for it is ignored.
        """

    @abstractmethod
    def schedule(self) -> Batch | None:
        """The next step's batch, or None if nothing can run now; something can while requests are unfinished and no
        batch is in flight.

        Every sequence in it has had `BlockManager.allocate` for its tokens and is entered with `Batch.add`, decoding
        ones before the others. A sequence is taken only while `num_uncomputed_tokens` > 0, and one without blocks only
        while none of its tokens is in flight. Sequences whose blocks were freed to make room are listed in
        `Batch.preempted`, or in that of the next batch if this call returns None.
        """

    @abstractmethod
    def update(self, batch: Batch) -> list[Sequence]:
        """Account for a batch whose tokens have been appended to its sequences.

        Returns the sequences of `batch` that ended with it (`is_finished`), their blocks freed, each exactly once.
        Sequences aborted, or ended by an earlier batch, are passed over.
        """

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Unfinished sequences without blocks."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Unfinished sequences with blocks."""


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
        """Make the cache. Called once. Its content must be finite, since masked entries are multiplied by zero."""

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

        Returns [T, N, H] in the query's dtype. The query may be a view with strides; its last dim is contiguous.
        """

    def store(self, layer: int, key_TKH: torch.Tensor, value_TKH: torch.Tensor) -> None:
        """Store the whole batch's keys and values of `layer`. Arguments may be views, as in `attend`."""
        slots, size = self.slot_mapping_T, self.cache(layer)[0].shape[1]
        for cache, new in zip(self.cache(layer), (key_TKH, value_TKH), strict=True):
            cache[slots // size, slots % size] = new

    def project_and_attend(self, layer: int, projection: Projection) -> torch.Tensor | None:
        """Norm, rotate, `store` and `attend` in one, [T, N, H]; None where there is no such way for the planned step.

        Only a step that is `AttentionInput.settled` may do it sequence by sequence.
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
