"""What executing a step leaves on a rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nanoflow.core.sampling.sampling_input import RowParams


@dataclass(slots=True)
class StepOutput:
    """Logits and tokens of S rows: of those sequences that sample; in a captured step of all, padding included.

    Attributes:
        logits_SV: of any float dtype, left alone by who reads them. With several ranks, this one's part of the
            vocabulary if the step is `temperature_only`, else all of it. Valid until the next step.
        params: what the rows are sampled by.
        tokens_S: int64; sampled by temperature alone, and written to `SlotState.last_token_R`. None in a step beside
            graphs that is not `temperature_only`: rank 0 is to sample.
        scored: logits [l, V] of the tokens `StepMessage.scored_L`, `logprobs.ROWS` at a time. All ranks go through it,
            before anything else that ranks do together.
        on_host: a captured step's tokens, as `PinnedIO.send` returns them; else None.
    """

    logits_SV: torch.Tensor
    params: RowParams
    tokens_S: torch.Tensor | None
    scored: Iterator[torch.Tensor] = field(default_factory=lambda: iter(()))
    on_host: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
