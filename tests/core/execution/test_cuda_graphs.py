"""What the runner does around captured steps, with steps that are run again instead: there may be no GPU here."""

from __future__ import annotations

from queue import Queue
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from nanoflow import SamplingParams
from nanoflow.core.api.options import config_from_options
from nanoflow.core.config.engine_config import Config
from nanoflow.core.data.batch import AttentionInput
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.engine import build
from nanoflow.core.engine.engine import Engine
from nanoflow.core.execution import build_runner
from nanoflow.core.execution.cuda_graphs import Capture, CudaGraphs, most_seqs
from nanoflow.core.execution.plan import make_plan
from nanoflow.core.execution.step_buffer import StepBuffer
from nanoflow.core.registry.registry import Registry
from nanoflow.testing.ranks import on_ranks
from tests.core.checkpoints import Oracle
from tests.core.running import tokens


class RerunGraphs(CudaGraphs):
    """Runs a step where a graph would be replayed. Also counts them, and what was drawn again."""

    def __init__(self, runner: Any, decodes: list[int], sizes: list[int]) -> None:
        self.model, self.attention, self.rows = runner.model, runner.attention, runner.rows
        self.ops, self.parallel = runner.ops, runner.rank_group.parallel
        self.block_size = runner.block_size
        self.max_num_seqs = len(self.rows.last_token_R) - 1
        self.decodes, self.tokens = decodes, sizes
        self.pinned_io = self._pinned_io()
        self.of_decodes = {size: self._empty(size, size, uniform_decode=True) for size in decodes}
        self.of_tokens = {
            size: self._empty(size, most_seqs(size, self.max_num_seqs), uniform_decode=False) for size in sizes
        }
        self.num_replays = {True: 0, False: 0}

    def _empty(self, num_tokens: int, num_seqs: int, *, uniform_decode: bool) -> Capture:
        buffer, nothing = StepBuffer(num_tokens, num_seqs, torch.device("cpu")), torch.empty(0)
        ints = np.zeros(0, np.int64)
        inputs = AttentionInput(nothing, nothing, nothing, nothing, ints, ints, 0, uniform_decode)
        return Capture(None, buffer, inputs, nothing, nothing)  # type: ignore[arg-type]

    def replay(self, capture: Capture) -> Any:
        tensors, arrays, uniform_decode = (
            capture.buffer.tensors,
            self.open(capture).arrays,
            capture.inputs.uniform_decode,
        )
        used = np.diff(arrays.query_start_S1) > 0
        inputs = AttentionInput(
            slot_mapping_T=tensors.slots_T,
            query_start_S1=tensors.query_start_S1,
            context_lens_S=tensors.context_lens_S,
            block_tables_SB=torch.zeros(len(used), self.rows.block_tables_RB.shape[1], dtype=torch.int32),
            query_lens=np.diff(arrays.query_start_S1).astype(np.int64),
            context_lens=arrays.context_lens_S.astype(np.int64),
            num_decodes=len(used) if uniform_decode else 0,
            uniform_decode=uniform_decode,
        )
        capture.logits_SV, capture.tokens_S = self._step(capture.buffer, inputs)
        self.num_replays[uniform_decode] += 1
        return self.pinned_io.send()


class Beside(RankGroup):
    """The other rank is a thread, which gets what rank 0 sends through a queue."""

    def __init__(self, parallel: ParallelContext, messages: Queue[bytes]) -> None:
        super().__init__(parallel, None)
        self.messages = messages

    def send(self, message: np.ndarray) -> None:
        self.messages.put(message.tobytes())

    def close(self) -> None:
        self.messages.put(b"")


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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
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
    oracle: Oracle, ranks: int, kinds: list[dict[str, Any]], overlap: bool, decodes: list[int], sizes: list[int],
    options: Any,
) -> None:  # fmt: skip
    reference = oracle("plain")
    params = [
        SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "seed": i} | kinds[i % len(kinds)]) for i in range(16)
    ]
    words = [output[4:6] for output in reference.outputs]
    messages: Queue[bytes] = Queue()
    registry = Registry.load()

    def config_of(**options: Any) -> Config:
        defaults = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 512, "block_size": 4}
        return config_from_options(registry, str(reference.folder), defaults | options)

    def run(engine: Engine) -> Any:
        outputs = {}
        for index, (prompt, param) in enumerate(zip(reference.prompts, params, strict=True)):
            engine.add_request(str(index), prompt, param)
            if len(kinds) > 2:  # these checkpoints have no tokenizer that could make ids of words
                engine.requests[str(index)].sequences[0].bad_words = [words[index]] if index % 5 == 0 else []
        while engine.has_unfinished:
            outputs |= {int(output.request_id): output for output in engine.step()}
        return [outputs[index] for index in range(16)]

    def run_rank(parallel: ParallelContext) -> Any:
        rank_group = Beside(parallel, messages)
        config = config_of(**{"overlap": overlap, "max_num_seqs": 16} | options)
        if parallel.rank > 0:
            plan = make_plan(config, registry, rank_group)
            runner = build_runner.build_runner(config, registry, plan, rank_group, lambda: None)[0]
            runner.graphs = RerunGraphs(runner, decodes, sizes)
            while message := messages.get(timeout=20):
                runner.follow(message)
            return None
        with patch.object(build, "form_rank_group", lambda config: rank_group):
            engine, _ = build.build_engine(config, registry)
        runner = engine.runner
        runner.send = rank_group.send if ranks > 1 else None
        runner.graphs = graphs = RerunGraphs(runner, decodes, sizes)
        try:
            return run(engine)
        finally:
            assert graphs.num_replays[True] > 0
            assert (graphs.num_replays[False] > 0) == bool(sizes)
            rank_group.close()

    expected = run(build.build_engine(config_of(max_num_seqs=1), registry)[0])
    found = on_ranks(ranks, run_rank)[0]
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
