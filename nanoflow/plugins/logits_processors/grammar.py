"""`structured_outputs`: the whole output matches a schema, a regex, a choice or a grammar."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.data.constraint import Constraint
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.sampling.logits import mask_bits
from nanoflow.plugins.logits_processors.grammar_compiler import GrammarCompiler
from nanoflow.plugins.logits_processors.grammar_state import Grammar


class GrammarProcessor(LogitsProcessor):
    """Masks what the grammar does not allow next. How far an output got in it stays with the sequence, as its
    constraint: tokens are accepted also while the sequence has no slot."""

    fields = ("structured_outputs",)
    needs_values = True

    def __init__(self, context: LogitsProcessorContext) -> None:
        self.device = context.device
        self.compiler = GrammarCompiler(context.tokenizer, context.vocab_size, context.eos_token_ids)

    def uses(self, params: SamplingParams) -> bool:
        return params.structured_outputs is not None

    def check(self, params: SamplingParams) -> None:
        assert params.structured_outputs is not None
        self.compiler.check(params.structured_outputs)

    def prepare(self, sequence: Sequence) -> Future[Constraint | None]:
        return self.compiler.submit(sequence.params)

    def close(self) -> None:
        self.compiler.close()

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        masks = []
        for sequence, position in zip(rows.sequences, rows.positions.tolist(), strict=True):
            assert isinstance(sequence.constraint, Grammar), "it was prepared"
            is_early = position - sequence.num_prompt_tokens < sequence.params.min_tokens
            masks.append(sequence.constraint.mask(is_early=is_early))
        # Row and mask side by side: one copy to the device, without waiting for it.
        table = to_device(np.column_stack((rows.indices.astype(np.int32), np.stack(masks))), self.device)
        mask_bits(logits_SV, table[:, 0], table[:, 1:])
