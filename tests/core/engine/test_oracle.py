"""Greedy tokens in float32 are exactly those of transformers, whatever the engine does to get them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow import LLM
from nanoflow.plugins.block_managers import prefix_cache
from nanoflow.testing.checkpoints import NUM_OUTPUT_TOKENS, edit_json, generate
from tests.core.checkpoints import SPECS, Oracle
from tests.core.running import check, engine_of, greedy, is_mixed, recorded, tokens

LONGEST = 80 + NUM_OUTPUT_TOKENS - 1  # tokens that the longest request of the plain checkpoint keeps in the cache


def start(oracle: Oracle, name: str = "plain", **options: Any) -> LLM:
    return LLM(str(oracle(name).folder), **{"dtype": "float32", "device": "cpu", "num_kv_blocks": 512} | options)


@pytest.mark.parametrize("name", [*SPECS, "bard"])
def test_checkpoints(oracle: Oracle, name: str) -> None:
    llm = start(oracle, name, block_size=8, max_num_seqs=8, max_num_batched_tokens=24)
    with recorded(llm) as batches:
        check(llm, oracle(name))
    assert any(map(is_mixed, batches))
    assert llm.stats.num_hit_tokens > 0
    if name.startswith("sharded"):
        assert len(list(oracle(name).folder.glob("*.safetensors"))) > 3


@pytest.mark.slow
def test_the_checkpoints_differ(oracle: Oracle) -> None:
    """A spec that was not heeded would give the tokens of another."""
    twins = {
        "sharded": "plain",
        "sharded_tied": "tied",
        "old_theta": "theta",
        "old_linear": "linear",
        "old_yarn": "yarn",
    }
    outputs = [tuple(oracle(name).outputs[0]) for name in SPECS if name not in twins and name != "plain"]
    assert len(set(outputs)) > len(outputs) - 2  # short prompts may agree where only the rotation differs
    for rope in ("linear", "yarn", "llama3"):
        assert oracle(rope).outputs[2:] != oracle("theta").outputs[2:]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 16, 64])
def test_batch_sizes(oracle: Oracle, max_num_seqs: int) -> None:
    llm = start(oracle, max_num_seqs=max_num_seqs)
    with recorded(llm) as batches:
        check(llm, oracle("plain"))
    assert max(len(batch.sequences) for batch in batches) == min(max_num_seqs, len(oracle("plain").prompts))


@pytest.mark.parametrize("budget", [4, 5, 16, 17, 100, 4096])
def test_chunk_sizes(oracle: Oracle, budget: int) -> None:
    llm = start(oracle, max_num_batched_tokens=budget, max_num_seqs=4)
    with recorded(llm) as batches:
        check(llm, oracle("plain"))
    assert max(batch.total_tokens for batch in batches) <= budget
    chunks = [n for batch in batches for s, n in zip(batch.sequences, batch.num_tokens, strict=True)
              if s.num_prompt_tokens == 80 and n > 1]  # fmt: skip
    assert chunks == [80] if budget == 4096 else len(chunks) > 1
    assert any(map(is_mixed, batches))


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 15, 16, 17, 32, 33, 100, 256])
@pytest.mark.parametrize("block_manager", ["plain", "prefix", "radix"])
def test_block_sizes(oracle: Oracle, block_size: int, block_manager: str) -> None:
    """Prompts of 3, 4, 5, 15, 16, 17, 31, 32 and 33 tokens: a block less one, whole, and one more."""
    llm = start(oracle, block_size=block_size, block_manager=block_manager, max_num_batched_tokens=50, max_num_seqs=5)
    check(llm, oracle("plain"))
    assert (llm.stats.num_hit_tokens > 0) == (block_manager != "plain" and block_size <= 48)


def test_one_prompt_at_a_time(oracle: Oracle) -> None:
    llm = start(oracle)
    for index in range(len(oracle("plain").prompts)):
        check(llm, oracle("plain"), [index])


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("budget", [16, 2048])
def test_fully_cached_prompts(oracle: Oracle, block_size: int, budget: int) -> None:
    """The same prompts once more: all of it but the last token, rounded down to blocks, comes from the cache."""
    reference = oracle("plain")
    llm = start(oracle, block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=8)
    check(llm, reference)
    for output in check(llm, reference):
        assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // block_size * block_size


@pytest.mark.parametrize("overlap", [False, True])
def test_twins_in_one_batch(oracle: Oracle, overlap: bool) -> None:
    """The same prompt several times at once: later ones read blocks that the first fills in the same step."""
    reference = oracle("plain")
    llm = start(oracle, block_size=4, overlap=overlap)
    with recorded(llm) as batches:
        outputs = check(llm, reference, [7, 7, 7, 10, 10])
    assert len(batches[0].sequences) == 5
    assert [output.num_cached_tokens for output in outputs] == [0, 28, 28, 0, 76]


def test_shared_prefixes(oracle: Oracle) -> None:
    llm = start(oracle, block_size=8, max_num_seqs=2)
    outputs = check(llm, oracle("plain"), [11, 12, 13, 14, 15])
    assert [output.num_cached_tokens for output in outputs] == [0, 32, 32, 32, 48]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("block_manager", ["plain", "prefix", "radix"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_forced_preemption(oracle: Oracle, block_size: int, block_manager: str, overlap: bool) -> None:
    llm = start(oracle, block_size=block_size, block_manager=block_manager, overlap=overlap,
                num_kv_blocks=-(-LONGEST // block_size), max_num_seqs=6, max_num_batched_tokens=20)  # fmt: skip
    with recorded(llm) as batches:
        outputs = check(llm, oracle("plain"))
    assert llm.stats.num_preemptions > 3
    assert sum(output.metrics.num_preemptions for output in outputs) == llm.stats.num_preemptions
    assert any(map(is_mixed, batches))


def test_preemption_by_one_block(oracle: Oracle) -> None:
    """Caches from just too small for two requests up to large enough for all."""
    preempted = []
    for num_kv_blocks in range(13, 48, 4):
        llm = start(oracle, block_size=4, num_kv_blocks=num_kv_blocks, block_manager="plain")
        check(llm, oracle("plain"), [5, 6, 7, 8])
        preempted.append(llm.stats.num_preemptions)
    assert preempted[0] > 0
    assert preempted[-1] == 0


@pytest.mark.parametrize("block_manager", ["plain", "prefix", "radix"])
def test_overlap(oracle: Oracle, block_manager: str) -> None:
    llm = start(
        oracle, overlap=True, block_manager=block_manager, block_size=4, max_num_batched_tokens=30, max_num_seqs=7
    )
    engine = engine_of(llm)
    deepest = 0
    for index, prompt in enumerate(oracle("plain").prompts):
        engine.add_request(str(index), prompt, greedy())
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
        deepest = max(deepest, len(engine.in_flight))
    assert deepest == 1
    outputs.sort(key=lambda output: int(output.request_id))
    assert tokens(outputs) == oracle("plain").outputs


def test_ragged_output_lengths(oracle: Oracle) -> None:
    """Requests that come and go at different times."""
    order = [i for _ in range(3) for i in range(16)]
    llm = start(oracle, block_size=4, max_num_seqs=6, max_num_batched_tokens=24, overlap=True)
    check(llm, oracle("plain"), order, [1 + (7 * place) % NUM_OUTPUT_TOKENS for place in range(len(order))])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scheduler", ["priority", "sjf", "lpm"])
@pytest.mark.parametrize("block_manager", ["prefix", "radix"])
def test_schedulers(oracle: Oracle, scheduler: str, block_manager: str, overlap: bool) -> None:
    """Whoever goes first or gives way, the tokens are the same."""
    reference = oracle("plain")
    llm = start(oracle, block_size=4, scheduler=scheduler, block_manager=block_manager, overlap=overlap,
                num_kv_blocks=-(-LONGEST // 4) + 1, max_num_seqs=5, max_num_batched_tokens=20)  # fmt: skip
    order = [*range(len(reference.prompts)), *reversed(range(len(reference.prompts)))]
    params = [replace(greedy(), priority=place % 5) for place in range(len(order))]
    outputs = tokens(llm.generate([reference.prompts[i] for i in order], params, use_tqdm=False))
    assert outputs == [reference.outputs[i] for i in order]
    assert llm.stats.num_preemptions > 0
    assert llm.stats.num_hit_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("block_manager", ["plain", "prefix"])
@pytest.mark.parametrize("budget", [6, 33])
@pytest.mark.parametrize("block_size", [3, 16])
@pytest.mark.parametrize("name", ["plain", "bard"])
def test_all_together(
    oracle: Oracle, name: str, block_size: int, budget: int, block_manager: str, overlap: bool
) -> None:
    reference = oracle(name)
    llm = start(oracle, name, block_size=block_size, block_manager=block_manager, overlap=overlap, max_num_seqs=5,
                max_num_batched_tokens=budget, num_kv_blocks=-(-LONGEST // block_size) + 1)  # fmt: skip
    order = [*range(len(reference.prompts)), *reversed(range(len(reference.prompts)))]
    with recorded(llm) as batches:
        check(llm, reference, order)
    assert llm.stats.num_preemptions > 0
    assert (llm.stats.num_hit_tokens > 0) == (block_manager == "prefix")
    assert any(map(is_mixed, batches))


def test_hash_collisions(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eight digests for all blocks, prompts still never mix; and the cache still finds what it can."""
    digest = xxhash.xxh3_64_intdigest
    monkeypatch.setattr(prefix_cache, "xxhash", SimpleNamespace(xxh3_64_intdigest=lambda data: digest(data) % 8))
    llm = start(oracle, block_size=4, max_num_seqs=4)
    for _ in range(2):
        check(llm, oracle("plain"))
    check(llm, oracle("plain"), [7, 7, 7])
    assert llm.stats.num_hit_tokens > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(oracle: Oracle, dtype: str) -> None:
    """Rounding changes some tokens, but most first ones are the same."""
    llm = start(oracle, "bard", dtype=dtype)
    outputs = tokens(llm.generate(oracle("bard").prompts, greedy(), use_tqdm=False))
    assert llm.describe()["dtype"] == dtype
    same = [mine[0] == theirs[0] for mine, theirs in zip(outputs, oracle("bard").outputs, strict=True)]
    assert sum(same) >= 4


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60)
def test_any_configuration(oracle: Oracle, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["plain", "gqa4", "yarn", "sharded_tied"]), "checkpoint")
    reference = oracle(name)
    block_size = data.draw(st.integers(1, 40), "block_size")
    max_num_seqs = data.draw(st.integers(1, 12), "max_num_seqs")
    fewest = -(-LONGEST // block_size)
    llm = start(
        oracle, name, block_size=block_size, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=data.draw(st.integers(max_num_seqs, 90), "max_num_batched_tokens"),
        num_kv_blocks=data.draw(st.integers(fewest, 3 * fewest), "num_kv_blocks"),
        scheduler=data.draw(st.sampled_from(["fcfs", "priority", "sjf", "lpm"]), "scheduler"),
        block_manager=data.draw(st.sampled_from(["plain", "prefix", "radix"]), "block_manager"),
        overlap=data.draw(st.booleans(), "overlap"),
    )  # fmt: skip
    some = st.integers(0, len(reference.prompts) - 1)
    for _ in range(data.draw(st.integers(1, 2), "calls")):
        order = data.draw(st.lists(some, min_size=1, max_size=16), "prompts")
        lengths = data.draw(st.lists(st.integers(1, 20), min_size=len(order), max_size=len(order)), "max_tokens")
        check(llm, reference, order, lengths)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("home", ["config.json", "generation_config.json"])
def test_end_of_sequence(oracle: Oracle, tmp_path: Path, home: str, overlap: bool) -> None:
    """Both stop at the same token; transformers' answer keeps it, and so does ours."""
    from transformers import AutoModelForCausalLM

    reference = oracle("plain")
    eos = [reference.outputs[10][4], reference.outputs[3][9]]
    folder = tmp_path / "checkpoint"
    shutil.copytree(reference.folder, folder)
    edit_json(folder / home, lambda c: c.update(eos_token_id=eos))
    llm = LLM(str(folder), dtype="float32", num_kv_blocks=512, block_size=4, overlap=overlap, max_num_seqs=4)
    outputs = llm.generate(reference.prompts, greedy(ignore_eos=False), use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = [generate(model, prompt, eos_token_id=eos)[0] for prompt in reference.prompts]
    assert tokens(outputs) == expected
    stopped = [output.outputs[0] for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert len(stopped) >= 2
    assert all(len(completion.token_ids) <= 20 and completion.token_ids[-1] in eos for completion in stopped)
    assert all(completion.stop_reason is None for completion in stopped)
    check(llm, reference)  # ignore_eos goes on to the end


def test_bundled_checkpoint_is_the_default() -> None:
    with LLM(num_kv_blocks=64) as llm:
        assert llm.describe()["checkpoint"] == "bard"
        output = llm.generate("HAMLET:\n", greedy(24), use_tqdm=False)[0]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nanoflow.core.loading.hub import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("bard"))
    model = AutoModelForCausalLM.from_pretrained(resolve("bard"), dtype=torch.float32)
    expected, _ = generate(model, tokenizer.encode("HAMLET:\n"), 24)
    assert output.outputs[0].token_ids == expected
    assert output["text"] == tokenizer.decode(expected, skip_special_tokens=True)
