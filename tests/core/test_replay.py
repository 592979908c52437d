"""What the runner does around captured steps, with steps that are run again instead: there may be no GPU here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanoflow import LLM, SamplingParams
from nanoflow.core.graphs import Capture, StepGraphs, most_seqs
from nanoflow.core.step import StepBuffer
from nanoflow.core.types import AttentionInput
from tests.core.checkpoints import Oracle
from tests.core.running import engine_of, tokens


class RerunGraphs(StepGraphs):
    """Runs a step where a graph would be replayed. Also counts them, and what was drawn again."""

    def __init__(self, runner: Any, decodes: list[int], sizes: list[int]) -> None:
        self.model, self.attention, self.rows = runner.model, runner.attention, runner.rows
        self.block_size = runner.block_size
        self.max_num_seqs = len(self.rows.last_token_R) - 1
        self.decodes, self.tokens = decodes, sizes
        self.mailbox = self._mailbox()
        self.of_decodes = {size: self._empty(size, size, settled=True) for size in decodes}
        self.of_tokens = {size: self._empty(size, most_seqs(size, self.max_num_seqs), settled=False) for size in sizes}
        self.num_replays = {True: 0, False: 0}

    def _empty(self, num_tokens: int, num_seqs: int, *, settled: bool) -> Capture:
        buffer, nothing = StepBuffer(num_tokens, num_seqs, torch.device("cpu")), torch.empty(0)
        ints = np.zeros(0, np.int64)
        inputs = AttentionInput(nothing, nothing, nothing, nothing, ints, ints, 0, settled)
        return Capture(None, buffer, inputs, nothing, nothing)  # type: ignore[arg-type]

    def replay(self, capture: Capture) -> Any:
        tensors, arrays, settled = capture.buffer.tensors, self.open(capture).arrays, capture.inputs.settled
        used = np.diff(arrays.query_start_S1) > 0
        inputs = AttentionInput(
            slot_mapping_T=tensors.slots_T,
            query_start_S1=tensors.query_start_S1,
            context_lens_S=tensors.context_lens_S,
            block_tables_SB=torch.zeros(len(used), self.rows.block_tables_RB.shape[1], dtype=torch.int32),
            query_lens=np.diff(arrays.query_start_S1).astype(np.int64),
            context_lens=arrays.context_lens_S.astype(np.int64),
            num_decodes=len(used) if settled else 0,
            settled=settled,
        )
        capture.logits_SV, capture.tokens_S = self._step(capture.buffer, inputs)
        self.num_replays[settled] += 1
        return self.mailbox.send()


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"repetition_penalty": 1.5, "logprobs": 2},
    {"top_k": 5},
    {"logprobs": 1},
    {"frequency_penalty": 1.0, "logit_bias": {7: 6.0, 9: 6.0}},
    {"prompt_logprobs": 1, "presence_penalty": 2.0},
    {"logit_bias": {5: 100}, "min_tokens": 9, "stop_token_ids": [5]},
]


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:2], KINDS[2:3], KINDS[3:4]])
@pytest.mark.parametrize(
    ("overlap", "decodes", "sizes", "options"),
    [
        (False, [2, 16], [], {}),
        (True, [2, 16], [], {}),
        (True, [1, 16], [16, 64], {"max_num_batched_tokens": 40}),
        (True, [4, 6], [8, 20], {"num_kv_blocks": 26, "max_num_seqs": 6, "max_num_batched_tokens": 20}),
    ],
)
def test_captured_steps_give_the_same(
    oracle: Oracle, kinds: list[dict[str, Any]], overlap: bool, decodes: list[int], sizes: list[int], options: Any
) -> None:
    reference = oracle("plain")
    params = [
        SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "seed": i} | kinds[i % len(kinds)]) for i in range(16)
    ]
    words = [output[4:6] for output in reference.outputs]

    def run(captured: bool, **options: Any) -> Any:
        llm = LLM(str(reference.folder), **{"dtype": "float32", "num_kv_blocks": 512, "block_size": 4} | options)
        engine = engine_of(llm)
        if captured:
            engine.runner.graphs = graphs = RerunGraphs(engine.runner, decodes, sizes)
        outputs = {}
        for index, (prompt, param) in enumerate(zip(reference.prompts, params, strict=True)):
            engine.add_request(str(index), prompt, param)
            if len(kinds) > 2:  # these checkpoints have no tokenizer that could make ids of words
                engine.requests[str(index)].sequences[0].bad_words = [words[index]] if index % 5 == 0 else []
        while engine.has_unfinished:
            outputs |= {int(output.request_id): output for output in engine.step()}
        if captured:
            assert graphs.num_replays[True] > 0
            assert (graphs.num_replays[False] > 0) == bool(sizes)
        return [outputs[index] for index in range(16)]

    expected, found = run(False, max_num_seqs=1), run(True, **{"overlap": overlap, "max_num_seqs": 16} | options)
    assert tokens(found) == tokens(expected)
    for output, other in zip(found, expected, strict=True):
        for entries, others in (
            (output.outputs[0].logprobs, other.outputs[0].logprobs), (output.prompt_logprobs, other.prompt_logprobs)
        ):  # fmt: skip
            assert (entries is None) == (others is None)
            for entry, expected_entry in zip(entries or (), others or (), strict=True):
                assert (entry or {}).keys() == (expected_entry or {}).keys()
                for token_id, value in (expected_entry or {}).items():
                    assert entry[token_id].logprob == pytest.approx(value.logprob, abs=2e-4)
