"""The contract of an executor: what runs batches, in this process or on several ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nanoflow.core.data.batch import Batch
from nanoflow.core.data.outputs import Logprob
from nanoflow.core.data.sequence import Sequence


@dataclass(frozen=True)
class Capabilities:
    """What an executor is and what it has room for; constant.

    Attributes:
        device: what to call its devices in reports, such as `2 x NVIDIA H100`.
        device_type: `cpu` or `cuda`.
        vocab_size: V; token ids lie below it.
        block_size: P, tokens in a block of the KV cache.
        num_kv_blocks: blocks that the block manager may hand out.
        max_num_seqs: most sequences in a batch, and most that hold blocks at a time.
        max_model_len: most tokens in a sequence.
    """

    device: str
    device_type: str
    vocab_size: int
    block_size: int
    num_kv_blocks: int
    max_num_seqs: int
    max_model_len: int


class PendingStep(ABC):
    """A submitted step, whose result is taken once."""

    @abstractmethod
    def result(self) -> list[int]:
        """A token id for each sequence that samples, in the order of the batch; -1 where none could be sampled, since
        its logits are NaN or infinite. Blocks until the device is there.

        Raises:
            NanoflowError: another rank failed.
        """

    @abstractmethod
    def logprobs(self, decode: Callable[[int], str | None]) -> Iterable[tuple[Sequence, int, list[dict[int, Logprob]]]]:
        """Log-probabilities that sequences asked for, of sampled tokens and of tokens of prompts; often none.

        To be asked for after `result`.

        Args:
            decode: text of a token id. Not asked where a sequence wants none (`SamplingParams.detokenize`).

        Returns:
            A sequence, the position of the first token in it, and for each token from there on its `Logprob`s by
            token id, as `Sequence.add_logprobs` takes them.
        """

    def failures(self) -> list[tuple[Sequence, str]]:
        """Sequences of which a logits processor failed, and a sentence about it; their tokens mean nothing.

        To be asked for after `result`.
        """
        return []


class Executor(ABC):
    """Runs batches, in the order in which they are submitted.

    It keeps what is known of a running sequence on its devices, in a slot (`Sequence.slot`) that it gives it with its
    first batch. A sequence keeps the slot until it is released, or is among the `preempted` of a batch.

    Attributes:
        capabilities: what it is and what it has room for.
        patience: seconds after which a Ctrl-C need not wait for the end of a step, since others may never come to it.
    """

    capabilities: Capabilities
    patience: float | None = None

    @abstractmethod
    def submit(self, batch: Batch) -> PendingStep:
        """Start a step. A device that works by itself may still be at it, or at earlier ones, when this returns.

        The batch is one of a scheduler's: its sequences hold blocks for their new tokens, and tokens whose values an
        earlier step is still to bring are the last of their sequences.

        Raises:
            NanoflowError: another rank failed. Nothing can be submitted any more.
        """

    @abstractmethod
    def release(self, sequence: Sequence) -> None:
        """Give the sequence's slot to others; nothing happens if it has none."""

    @abstractmethod
    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of the model runner on every rank, behind the steps that were submitted.

        Args:
            method: its name.
            args: plain data: what JSON can hold.

        Returns:
            What each rank returns, in their order; plain data, too.

        Raises:
            NanoflowError: it raised on a rank; says on which one and what. All ranks have called it, and go on. Or
                another rank failed.
        """

    @abstractmethod
    def close(self) -> None:
        """End what the executor started, such as other ranks. Nothing can be submitted then; may be called again."""
