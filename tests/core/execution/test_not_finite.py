"""Logits that are NaN end their own request, and no other one's tokens change by it."""

from __future__ import annotations

from pathlib import Path
from queue import Queue
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.core.api.options import config_from_options
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.engine import build
from nanoflow.core.engine.engine import Engine
from nanoflow.core.execution.build_runner import build_runner
from nanoflow.core.execution.plan import make_plan
from nanoflow.core.execution.rank_executor import handle
from nanoflow.core.registry.registry import Registry
from nanoflow.testing.ranks import on_ranks
from tests.core.checkpoints import make_tiny
from tests.core.execution.test_cuda_graphs import Beside, RerunGraphs

POISON = 100  # a token whose embedding is NaN
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_k": 7, "top_p": 0.9}, {"temperature": 0.0, "logprobs": 2},
    {"repetition_penalty": 1.5, "seed": 3}, {"logit_bias": {9: 2.0}, "presence_penalty": 1.0, "temperature": 0.0},
    {"frequency_penalty": 1.0, "logprobs": 1, "seed": 4},
    {"temperature": 0.0, "logit_bias": {7: 2.0, POISON: -100}},
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny(tmp_path_factory.mktemp("poisoned") / "c", model_type="llama", seed=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    weights["lm_head.weight"][POISON] = 0  # never the likeliest, and kept out by a bias where that is not enough
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def params_of(kinds: list[dict[str, Any]], index: int) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | kinds[index % len(kinds)])


def prompts() -> list[list[int]]:
    """Of many lengths; every third one holds the poison, in its middle or at its end."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(12):
        prompt = torch.randint(1, POISON, (3 + 5 * (index % 5),), generator=generator).tolist()
        if index % 3 == 1:
            prompt[-1 if index % 2 else 1] = POISON
        found.append(prompt)
    return found


def run(engine: Engine, kinds: list[dict[str, Any]], chosen: list[int]) -> dict[int, RequestOutput]:
    outputs = {}
    for index in chosen:
        engine.add_request(str(index), prompts()[index], params_of(kinds, index))
        engine.step()  # so that they are at different places, and slots and blocks are used again
    while engine.has_unfinished:
        outputs |= {int(output.request_id): output for output in engine.step()}
    return outputs


@pytest.mark.parametrize("kinds", [KINDS[:2], KINDS], ids=["temperature only", "processors"])
@pytest.mark.parametrize(
    ("ranks", "overlap", "captured", "accelerate"),
    [
        (1, False, False, False),
        (1, False, False, True),
        (1, True, False, True),
        (1, True, True, True),
        (2, False, False, True),
        (2, True, True, True),
    ],
)
def test_others_keep_their_tokens(
    checkpoint: Path, ranks: int, overlap: bool, captured: bool, accelerate: bool, kinds: list[dict[str, Any]]
) -> None:
    registry, messages = Registry.load(extra=[]), Queue[bytes]()

    def config_of(**options: Any) -> Any:
        defaults = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 60, "block_size": 4, "max_num_seqs": 4}
        return config_from_options(registry, str(checkpoint), defaults | options)

    def run_rank(parallel: ParallelContext) -> Any:
        rank_group = Beside(parallel, messages) if ranks > 1 else RankGroup(parallel, None)
        config = config_of(overlap=overlap, accelerate=accelerate)
        if parallel.rank > 0:
            runner, _ = build_runner(
                config, registry, make_plan(config, registry, rank_group), rank_group, lambda: None
            )
            runner.graphs = RerunGraphs(runner, [2, 4], [16, 64]) if captured else None
            while message := messages.get(timeout=20):
                handle(runner, rank_group, message)  # type: ignore[arg-type]
            return None
        with patch.object(build, "form_rank_group", lambda config: rank_group):
            engine, _ = build.build_engine(config, registry)
        runner = engine.executor.runner  # type: ignore[attr-defined]
        runner.graphs = RerunGraphs(runner, [2, 4], [16, 64]) if captured else None
        try:
            return run(engine, kinds, list(range(12)))
        finally:
            rank_group.close()

    healthy = [index for index, prompt in enumerate(prompts()) if POISON not in prompt]
    alone, _ = build.build_engine(config_of(max_num_seqs=1), registry)
    expected = {index: run(alone, kinds, [index])[index] for index in healthy}
    assert not any(POISON in output.outputs[0].token_ids for output in expected.values())
    found = on_ranks(ranks, run_rank)[0]
    for index, output in found.items():
        (completion,) = output.outputs
        if index in healthy:
            assert completion.token_ids == expected[index].outputs[0].token_ids
            assert completion.finish_reason == "length"
        else:
            assert (completion.token_ids, completion.finish_reason) == ([], "error")
            assert "NaN" in str(completion.stop_reason)
            assert output.metrics.first_token_time is None


def test_all_candidates_forbidden(checkpoint: Path) -> None:
    """As where a bias and a processor leave nothing: an error as well, not the first token of the vocabulary."""
    with LLM(str(checkpoint), dtype="float32", num_kv_blocks=60) as llm:
        forbid = SamplingParams(temperature=0.0, allowed_token_ids=[5], stop_token_ids=[5], min_tokens=0, max_tokens=2)
        (output,) = llm.generate([[1, 2]], forbid, use_tqdm=False)
        assert output.outputs[0].finish_reason == "stop"
        processor = llm.engine.processors.by_name["bias_and_penalties"]
        with patch.object(processor, "apply", lambda logits, rows: torch.full_like(logits, -torch.inf)):
            (output,) = llm.generate([[1, 2]], forbid, use_tqdm=False)
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "error")
