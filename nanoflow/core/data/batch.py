"""`Batch`: what one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.core.data.reasons import PreemptReason
from nanoflow.core.data.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """What one step computes: for each sequence, tokens `starts[i]` to `starts[i] + num_tokens[i]`.

    Decoding sequences, which have one token, come first, so that a backend can serve them with its decode kernel;
    chunks of any length follow.

    Attributes:
        sequences: S sequences, each at most once.
        starts: S positions of the first new token.
        num_tokens: S counts of new tokens, each at least 1.
        samples: S flags: whether the chunk reaches the sequence's end, so that a token is sampled.
        preempted: sequences that lost their blocks since the previous batch.
        preempt_reasons: why, one for each of them; empty if the scheduler gives none.
    """

    sequences: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    preempt_reasons: list[PreemptReason] = field(default_factory=list)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Append the sequence's next `num_tokens` tokens, and count them as computed (`Sequence.advance`)."""
        self.sequences.append(sequence)
        self.starts.append(sequence.num_computed_tokens)
        self.num_tokens.append(num_tokens)
        self.samples.append(sequence.advance(num_tokens))

    @property
    def total_tokens(self) -> int:
        """T."""
        return sum(self.num_tokens)

    @property
    def num_decodes(self) -> int:
        """How many leading sequences have exactly one new token."""
        return next((i for i, n in enumerate(self.num_tokens) if n > 1), len(self.num_tokens))
