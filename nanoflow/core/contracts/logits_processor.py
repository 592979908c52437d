"""The contract of a logits processor: it changes the logits of some requests before their tokens are sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from nanoflow.core.ops import Ops

import numpy as np

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.data.constraint import Constraint
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.text.tokenizer import Tokenizer


def _plain_ops() -> Ops:
    from nanoflow.core.ops import Ops  # which needs PyTorch

    return Ops()


@dataclass(frozen=True)
class LogitsProcessorContext:
    """What a logits processor is built from.

    Attributes:
        vocab_size: V, the model's; logits have so many entries. The tokenizer may know more or fewer tokens.
        num_slots: R; slots go from 0 to R - 1. A table by slot has so many rows.
        device: where logits are.
        tokenizer: the checkpoint's; None if it has none.
        eos_token_ids: ids that end a request unless it ignores them.
        max_model_len: most tokens in a sequence.
        ops: to compute with; by default plain PyTorch.
    """

    vocab_size: int
    num_slots: int
    device: torch.device
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    max_model_len: int
    ops: Ops = field(default_factory=_plain_ops)


@dataclass(frozen=True, slots=True)
class LogitsRows:
    """N rows of a step's logits, those that a processor is to change.

    Attributes:
        indices: int64 numpy array [N], rising; which rows of the logits.
        slots: int64 numpy array [N]; the slots of their sequences.
        positions: int64 numpy array [N]; index in its sequence of the token to be sampled.
        sequences: N sequences. `token_ids` lacks the value of a token in flight: it has `positions` entries, or one
            fewer, unless the processor `needs_values`.
    """

    indices: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    sequences: list[Sequence]


class LogitsProcessor(ABC):
    """Changes the logits of those requests that ask for it.

    There is one object for an engine; it serves all requests. A running sequence has a slot, a small number, from
    `assign` to `release`. A preempted sequence loses its slot, and gets another one when it goes on.

    It runs on rank 0 alone. That rank has all logits, samples, and tells the other ranks the tokens. In a step that is
    replayed as a CUDA graph, the slots that some processor wants are sampled again beside the graph, so a processor
    need not be capturable.

    Several processors of one request apply one after the other, by falling `Component.priority`; those that are built
    in come first. They get logits before temperature, top-k, top-p and min-p. Log-probabilities are the model's own,
    taken before.

    What a request gets must not depend on what else is in the batch, on its slot, or on preemptions.
    `nanoflow.testing.LogitsProcessorSuite` checks that.

    Threads: `check` is called from any thread, also while a step runs; all others from the engine's thread.

    What any method raises ends the requests that it concerns, and neither others nor the engine: from `check` it is
    raised to the caller who adds the request; from the rest the request ends with `finish_reason` "error", and
    `stop_reason` says what was raised. Where a call concerns several requests, `apply` is called again for each of
    them alone, to find out whose it is; for the other methods all of them end. (An error of the device itself, such as
    an illegal address, can't be kept to a request.)

    Attributes:
        name: its component's; set by the engine when it is built.
        in_place: how `apply` changes logits, see there.
        needs_values: whether `apply` needs the values of all tokens before the one to be sampled, on the host. Then
            steps of its sequences don't overlap: each waits for the token before. Counts on the device by `observe`
            need no such wait.
        fields: fields of `SamplingParams`; a request that leaves all of these as they are by default does not use this
            processor, and `uses` is not asked. None: a class with a `uses` of its own is always asked.
    """

    name: str = ""
    fields: ClassVar[tuple[str, ...] | None] = None
    in_place: ClassVar[bool] = True
    needs_values: ClassVar[bool] = False

    def uses(self, params: SamplingParams) -> bool:
        """Whether a request with these parameters uses this processor; by default if it gives arguments under its name.

        All other methods are called for such requests only.
        """
        return self.name in (params.logits_processors or {})

    def arguments(self, params: SamplingParams) -> dict[str, Any]:
        """What the request gives under the processor's name: `SamplingParams(logits_processors={name: arguments})`."""
        return (params.logits_processors or {}).get(self.name, {})

    def samples_all(self, params: SamplingParams) -> bool:
        """Whether every output token of such a request has to be sampled and observed, those included that a constraint
        leaves no choice about; by default if the class has an `observe` of its own."""
        return type(self).observe is not LogitsProcessor.observe

    def check(self, params: SamplingParams) -> None:  # noqa: B027 (nothing to check by default)
        """Refuse a request before it is queued. Should cost less than a step.

        Raises:
            RequestError: it can't be served; one sentence that says why and what would be right.
        """

    def prepare(self, sequence: Sequence) -> Future[Constraint | None] | None:
        """Begin what takes long, such as compiling a grammar, elsewhere than in the engine's thread.

        Called once for each new sequence; it is queued when the future is done. The result may be what the sequence's
        output is held to (`Sequence.constraint`), which only one processor of a request may give. It lives as long as
        the sequence, whatever slots that has. None: there is nothing to prepare.
        """
        return None

    def assign(self, slot: int, sequence: Sequence) -> None:  # noqa: B027 (stateless by default)
        """The slot is this sequence's from now on.

        All its tokens are known then, `sequence.token_ids` has them: after a preemption also output tokens, which
        must count as if they had been observed.
        """

    def wants(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Whose logits are to be changed, bool [S]; by default all.

        A row that no processor wants costs nothing in this step. Called once or twice a step; must change nothing.

        Args:
            slots: int64 [S]; of sequences that use this processor.
            positions: int64 [S]; index in its sequence of the token to be sampled.
        """
        return np.ones(len(slots), bool)

    @abstractmethod
    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> torch.Tensor | None:
        """Change the logits of these rows; -inf for what must not be sampled. At least one should stay finite.

        Must change nothing else: it may be called again for the same step. Must not wait for a GPU (`.item()`,
        `.tolist()`, `.cpu()`), or that waits for the host each step.

        Args:
            logits_SV: on the context's device. If `in_place`: float32, contiguous, to be changed in place; the result
                does not count. Otherwise of any float dtype and any row stride, to be left alone; the result is a new
                tensor [S, V], float32, contiguous, with all S rows; so a kernel may convert and change in one pass.
            rows: which rows to change; the others are of sequences that don't use this processor, or don't want it now.
        """

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:  # noqa: B027 (stateless by default)
        """These slots sampled these tokens. Called in each step, whether `wants` said yes or no.

        Args:
            slots: int64 [S], distinct; of sequences that use this processor.
            tokens_S: int64, on the context's device. Their values may not be there yet: compute with them on the
                device.
        """

    def release(self, slot: int) -> None:  # noqa: B027 (stateless by default)
        """The slot is nobody's until the next `assign`; what was kept for its sequence may go."""

    def close(self) -> None:  # noqa: B027 (stateless by default)
        """Let go of what the processor started, such as threads. It is used no more; may be called again."""
