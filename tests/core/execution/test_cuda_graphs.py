"""What the runner does around captured steps, with steps that are run again instead: there may be no GPU here."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from queue import Queue
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch

from nanoflow import SamplingParams
from nanoflow.core.api.options import config_from_options
from nanoflow.core.config.engine_config import Config
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.rank_group import Driver, RankGroup
from nanoflow.core.engine import build
from nanoflow.core.engine.engine import Engine
from nanoflow.core.execution import build_runner, cuda_graphs
from nanoflow.core.execution.cuda_graphs import Capture, Compute, CudaGraphs, buffer_bytes
from nanoflow.core.execution.local_executor import LocalExecutor
from nanoflow.core.execution.model_runner import ModelRunner
from nanoflow.core.execution.pinned_io import PinnedIO
from nanoflow.core.execution.plan import make_plan
from nanoflow.core.execution.rank_executor import handle
from nanoflow.core.execution.slot_state import SlotState
from nanoflow.core.execution.step_buffer import StepInput
from nanoflow.core.execution.step_output import StepOutput
from nanoflow.core.ops import Ops
from nanoflow.core.registry.registry import Registry
from nanoflow.core.sampling.sampling_input import RowParams
from nanoflow.testing.ranks import on_ranks
from tests.core.checkpoints import Oracle
from tests.core.running import tokens
from tests.core.scripted import entry_point
from tests.plugins.logits_processors import at_most
from tests.plugins.logits_processors.rows import as_words, use_numerals


class RerunGraphs(CudaGraphs):
    """Runs a step where a graph would be replayed, and counts them. What the one before left is gone then."""

    def __init__(self, runner: ModelRunner, decodes: list[int], sizes: list[int]) -> None:
        self.num_replays = {True: 0, False: 0}
        self.newest: StepOutput | None = None
        super().__init__(
            runner._compute, runner.slots, runner.ops, block_size=runner.block_size, decodes=decodes, tokens=sizes
        )

    def _capture_all(self, compute: Compute) -> None:
        self.compute = compute
        self.of_tokens = {size: self._empty(size, uniform_decode=False) for size in self.tokens}
        self.of_decodes = {size: self._empty(size, uniform_decode=True) for size in self.decodes}

    def _empty(self, num_tokens: int, *, uniform_decode: bool) -> Capture:
        buffer, inputs = self._fixed(num_tokens, uniform_decode=uniform_decode)
        return Capture(None, buffer, inputs, None)  # type: ignore[arg-type]

    def replay(self, capture: Capture) -> Any:
        if self.newest is not None:
            self.newest.logits_SV.fill_(torch.nan)
            self.newest.params.temperature_S.fill_(torch.nan)
        arrays = self.pinned_io.open(capture.buffer.num_tokens, capture.buffer.num_seqs).arrays
        query_lens, context_lens = np.diff(arrays.query_start_S1), arrays.context_lens_S
        inputs = replace(
            capture.inputs, query_lens=query_lens.astype(np.int64), context_lens=context_lens.astype(np.int64)
        )
        capture.output = self.newest = self._step(self.compute, capture.buffer, inputs)
        self.num_replays[capture.inputs.uniform_decode] += 1
        return self.pinned_io.send()


class Beside(Driver):
    """The other rank is a thread, which gets what rank 0 sends through a queue."""

    def __init__(self, parallel: ParallelContext, messages: Queue[bytes]) -> None:
        RankGroup.__init__(self, parallel, None)
        self.messages = messages

    minimum, check = RankGroup.minimum, RankGroup.check

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
NAMED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logits_processors": {"at_most": {"times": 1}}},
    {"temperature": 0.0},
    {"logits_processors": {"at_most": {"times": 1, "after": 20}}},  # counts what graphs sample before
    {"temperature": 0.0, "logits_processors": {"newest": {}, "at_most": {"times": 3}}, "logprobs": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kinds", [KINDS, KINDS[:2], KINDS[2:3], KINDS[3:4], NAMED])
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
    registry = Registry.load(extra=[entry_point(at_most)])

    def config_of(**options: Any) -> Config:
        defaults = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 512, "block_size": 4}
        return config_from_options(registry, str(reference.folder), defaults | options)

    def run(engine: Engine) -> Any:
        outputs = {}
        use_numerals(engine)  # these checkpoints have no tokenizer that could make ids of words
        for index, (prompt, param) in enumerate(zip(reference.prompts, params, strict=True)):
            if kinds is KINDS and index % 5 == 0:
                param = replace(param, bad_words=as_words([words[index]]))
            engine.add_request(str(index), prompt, param)
        while engine.has_unfinished:
            outputs |= {int(output.request_id): output for output in engine.step()}
        return [outputs[index] for index in range(16)]

    def run_rank(parallel: ParallelContext) -> Any:
        rank_group = Beside(parallel, messages) if ranks > 1 else RankGroup(parallel, None)
        config = config_of(**{"overlap": overlap, "max_num_seqs": 16} | options)
        if parallel.rank > 0:
            plan = make_plan(config, registry, rank_group)
            runner, _ = build_runner.build_runner(config, registry, plan, rank_group, lambda: None)
            runner.graphs = RerunGraphs(runner, decodes, sizes)
            while message := messages.get(timeout=20):
                handle(runner, rank_group, message)  # type: ignore[arg-type]
            return None
        with patch.object(build, "form_rank_group", lambda config: rank_group):
            engine, _ = build.build_engine(config, registry)
        assert isinstance(engine.executor, LocalExecutor)
        runner = engine.executor.runner
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


def bytes_of(*roots: Any) -> int:
    """Bytes of the tensors that can be reached from here, memory that several share once."""
    storages, known = {}, set()
    left = list(roots)
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif id(item) not in known and not callable(item):
            known.add(id(item))
            left += gc.get_referents(item)
    return sum(storages.values())


def test_graphs_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: what is kept beside the pool is the buffers of the largest step."""
    max_num_seqs, vocab_size, width = 64, 5000, 1000
    for name in ("CUDAGraph", "Stream", "current_stream", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda_graphs, "unowned", lambda x: x[:0].clone())  # the pool's
    slots = SlotState.empty(max_num_seqs, width, 7, torch.device("cpu"))

    def compute(step: StepInput, inputs: AttentionInput, pinned_io: PinnedIO) -> StepOutput:
        num_seqs = len(step.slots_S)
        assert inputs.block_tables_SB.shape == (num_seqs, width)
        assert (inputs.block_tables_SB == 7).all()
        temperature_S, seed_S = torch.zeros(num_seqs), torch.zeros(num_seqs, dtype=torch.int64)
        params = RowParams(temperature_S, seed_S, step.context_lens_S, step.targets_S)
        return StepOutput(torch.zeros(num_seqs, vocab_size), params, torch.zeros_like(seed_S))

    found = []
    for decodes, sizes in (([64], [128]), ([1, 2, 4, 8, 16, 32, 48, 64], [16, 32, 64, 96, 128])):
        graphs = CudaGraphs(compute, slots, Ops(), block_size=16, decodes=decodes, tokens=sizes)
        shared = bytes_of(graphs.memory, graphs.block_tables_SB)
        assert shared == buffer_bytes(decodes, sizes, max_num_seqs, width)
        found.append(bytes_of(*vars(graphs).values()) - bytes_of(graphs.pinned_io) - bytes_of(slots))
        captures = [*graphs.of_decodes.values(), *graphs.of_tokens.values()]
        assert shared <= found[-1] <= shared + sum(20 * capture.buffer.num_seqs for capture in captures)
    assert found[1] - found[0] < 20_000
    assert buffer_bytes([], [], max_num_seqs, width) == 0
    kept = weakref.ref(compute)  # a runner's, which would be a circle
    del compute
    assert kept() is None
    assert graphs.of_tokens
