"""Sampling: filters as in transformers, draws that follow the distribution, and seeds that fix them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nanoflow import LLM, SamplingParams
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.ops.filters import Filters, keep_likely, keep_top
from nanoflow.core.ops.sampling import gumbel_noise, sample
from nanoflow.testing.ranks import on_ranks
from tests.core.checkpoints import Oracle
from tests.core.running import greedy, is_mixed, recorded, tokens

SEEDS = [0, 1, -1, -(2**63), 2**31, 2**32 + 1, 2**63 - 1]


def inputs(count: int, **columns: Any) -> dict[str, Any]:
    """What `sample` takes: parameters of `count` rows; a scalar stands for all rows."""
    values = {"temperature": 1.0, "top_k": 10**6, "top_p": 1.0, "min_p": 0.0, "seed": np.arange(count), "position": 5}
    values |= columns
    dtypes = {"temperature": np.float32, "top_p": np.float32, "min_p": np.float32}
    arrays = {
        name: np.broadcast_to(np.asarray(v, dtypes.get(name, np.int64)), count).copy() for name, v in values.items()
    }
    columns_S = {name: torch.from_numpy(array) for name, array in arrays.items()}
    filters = Filters(*(columns_S.pop(name) for name in ("top_k", "top_p", "min_p")))
    return {f"{name}_S": column_S for name, column_S in columns_S.items()} | {"filters": filters}


def random_scores(seed: int, rows: int, vocab_size: int, spread: float) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).unsqueeze(-1)


@given(seed=st.integers(0, 10**6), vocab_size=st.integers(1, 70), spread=st.floats(0.1, 8), data=st.data())
def test_top_k_as_in_transformers(seed: int, vocab_size: int, spread: float, data: st.DataObject) -> None:
    from transformers import TopKLogitsWarper

    scores = random_scores(seed, 3, vocab_size, spread)
    if data.draw(st.booleans(), "ties"):
        scores = scores.round()
    top_k = data.draw(st.lists(st.integers(1, 80), min_size=3, max_size=3))
    kept = keep_top(scores, column(top_k, torch.int64), column([1.0] * 3, torch.float32))
    for row in range(3):
        torch.testing.assert_close(kept[row : row + 1], TopKLogitsWarper(top_k[row])(None, scores[row : row + 1]))


@given(seed=st.integers(0, 10**6), vocab_size=st.integers(1, 70), spread=st.floats(0.1, 8), data=st.data())
def test_top_p_as_in_transformers(seed: int, vocab_size: int, spread: float, data: st.DataObject) -> None:
    from transformers import TopPLogitsWarper

    scores = random_scores(seed, 3, vocab_size, spread)
    top_p = data.draw(st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3))
    sums = scores.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    assume(((sums - column(top_p, torch.float64)).abs() > 1e-5)[:, :-1].all())  # no close calls
    kept = keep_top(scores, column([10**6] * 3, torch.int64), column(top_p, torch.float32))
    for row in range(3):
        torch.testing.assert_close(kept[row : row + 1], TopPLogitsWarper(top_p[row])(None, scores[row : row + 1]))


@given(seed=st.integers(0, 10**6), vocab_size=st.integers(1, 70), spread=st.floats(0.1, 8), data=st.data())
def test_min_p_as_in_transformers(seed: int, vocab_size: int, spread: float, data: st.DataObject) -> None:
    from transformers import MinPLogitsWarper

    scores = random_scores(seed, 3, vocab_size, spread)
    min_p = data.draw(st.lists(st.one_of(st.just(0.0), st.floats(0.001, 0.999)), min_size=3, max_size=3))
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    assume(((shares - column(min_p, torch.float32)).abs() > 1e-5).all())
    kept = keep_likely(scores, column(min_p, torch.float32))
    for row in range(3):
        torch.testing.assert_close(kept[row : row + 1], MinPLogitsWarper(min_p[row])(None, scores[row : row + 1]))


def test_filters_apply_in_order() -> None:
    """top_p shares out what top_k left: 0.4 and 0.3 of four are 0.57 and 0.43 of two."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    one = keep_top(scores, torch.tensor([[2]]), torch.tensor([[0.5]]))
    two = keep_top(scores, torch.tensor([[4]]), torch.tensor([[0.5]]))
    assert one.isfinite().tolist() == [[True, False, False, False]]
    assert two.isfinite().tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("varied", ["seed", "position"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
)
def test_draws_follow_the_distribution(options: dict[str, float], varied: str) -> None:
    """Pearson's chi-square of 40,000 draws, over seeds of one position and over positions of one seed."""
    count = 40_000
    logits = random_scores(3, 1, 24, 1.5)
    params = {"temperature": 1.0, "top_k": 10**6, "top_p": 1.0, "min_p": 0.0} | options
    rows = {"seed": {"seed": np.arange(count)}, "position": {"seed": 77, "position": np.arange(count)}}[varied]
    drawn = sample(logits.repeat(count, 1), **inputs(count, **params, **rows))
    scores = keep_top(
        logits / params["temperature"], torch.tensor([[int(params["top_k"])]]), torch.tensor([[params["top_p"]]])
    )
    expected = keep_likely(scores, torch.tensor([[params["min_p"]]]))[0].softmax(-1) * count
    observed = drawn.bincount(minlength=24)
    assert (observed[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((observed - expected) ** 2 / expected)[possible].sum().item()
    freedom = int(possible.sum()) - 1
    assert freedom >= 3
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_noise_of_candidates_positions_and_seeds_is_unrelated() -> None:
    noise = gumbel_noise(torch.arange(40).unsqueeze(-1), torch.full((40, 1), 3), 2000)
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.05
    for other in (
        gumbel_noise(torch.arange(40).unsqueeze(-1), torch.full((40, 1), 4), 2000),
        gumbel_noise(torch.arange(1, 41).unsqueeze(-1), torch.full((40, 1), 3), 2000),
        gumbel_noise(torch.arange(40).unsqueeze(-1) + 2**40, torch.full((40, 1), 3), 2000),
        noise.roll(1, -1),
    ):
        assert abs(torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1].item()) < 0.02


def test_all_bits_of_a_seed_count() -> None:
    noise = gumbel_noise(column(SEEDS, torch.int64), column([7] * len(SEEDS), torch.int64), 50)
    assert noise.isfinite().all()
    assert len({tuple(row.tolist()) for row in noise}) == len(SEEDS)


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = random_scores(0, 64, 300, 1.0)
    whole = sample(logits.clone(), **inputs(64, top_k=50, top_p=0.9))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = sample(logits[order], **inputs(64, top_k=50, top_p=0.9, seed=order.numpy()))
    assert torch.equal(whole[order], shuffled)
    alone = [sample(logits[i : i + 1].clone(), **inputs(1, top_k=50, top_p=0.9, seed=i)).item() for i in range(64)]
    assert alone == whole.tolist()


def test_rows_keep_their_own_parameters() -> None:
    """Filters that one row asks for leave the others as they were alone."""
    logits = random_scores(0, 6, 50, 1.0)
    columns = {
        "temperature": np.array([0, 1, 0.5, 0, 2, 1]), "top_k": np.array([9, 1, 10**6, 3, 4, 10**6]),
        "top_p": np.array([1, 1, 0.3, 0.2, 1, 1]), "min_p": np.array([0, 0, 0, 0.9, 0.2, 0]),
    }  # fmt: skip
    together = sample(logits.clone(), **inputs(6, **columns))
    for row in range(6):
        alone = sample(logits[row : row + 1].clone(), **inputs(1, seed=row, **{k: v[row] for k, v in columns.items()}))
        assert alone.item() == together[row].item()
    best = logits.argmax(-1)
    assert together[[0, 1, 3]].tolist() == best[[0, 1, 3]].tolist()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-3}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_limits_are_greedy(options: dict[str, float]) -> None:
    logits = random_scores(0, 64, 300, 3.0)
    assert torch.equal(sample(logits.clone(), **inputs(64, **options)), logits.argmax(-1))


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-38}, {"temperature": 1e-42}, {"top_p": 1e-40}, {"top_p": 1e-46}]
)
def test_values_below_float32_are_greedy_too(oracle: Oracle, options: dict[str, float]) -> None:
    """`SamplingParams` takes them, so they must not give garbage."""
    llm = LLM(str(oracle("plain").folder), num_kv_blocks=64)
    prompt = oracle("plain").prompts[4]
    output = llm.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True, **options), use_tqdm=False)[0]
    assert output["token_ids"] == oracle("plain").outputs[4]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{"temperature": 1e300}, {"top_k": 2**70}, {"top_k": 2**31}])
def test_huge_values(oracle: Oracle, options: dict[str, Any]) -> None:
    """They are as good as none, and above all they harm no other request."""
    llm = LLM(str(oracle("plain").folder), num_kv_blocks=64)
    params = [SamplingParams(max_tokens=20, ignore_eos=True, seed=1, **options), greedy()]
    outputs = llm.generate(oracle("plain").prompts[4:6], params, use_tqdm=False)
    assert outputs[1]["token_ids"] == oracle("plain").outputs[5]
    assert len(set(outputs[0]["token_ids"])) > 5


def drawn(oracle: Oracle, params: list[SamplingParams], **options: Any) -> list[list[int]]:
    llm = LLM(str(oracle("plain").folder), **{"dtype": "float32", "num_kv_blocks": 512, "block_size": 4} | options)
    prompts = oracle("plain").prompts[: len(params)]
    with recorded(llm) as batches:
        result = tokens(llm.generate(prompts, params, use_tqdm=False))
    if "num_kv_blocks" in options:
        assert llm.stats.num_preemptions > 0
    if "max_num_batched_tokens" in options:
        assert any(map(is_mixed, batches))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.05, "temperature": 1.3}])
def test_same_seed_draws_the_same_tokens(oracle: Oracle, filters: dict[str, Any]) -> None:
    """However a request was batched, chunked, preempted, cached or overlapped."""
    params = [SamplingParams(max_tokens=20, ignore_eos=True, seed=100 + i, **filters) for i in range(12)]
    expected = drawn(oracle, params)
    assert len({tuple(row) for row in expected}) == 12
    assert drawn(oracle, params) == expected
    for options in (
        {"max_num_seqs": 1}, {"max_num_seqs": 3, "max_num_batched_tokens": 7}, {"overlap": True},
        {"block_manager": "plain", "overlap": True, "num_kv_blocks": 25}, {"num_kv_blocks": 26, "max_num_seqs": 6},
    ):  # fmt: skip
        assert drawn(oracle, params, **options) == expected


@pytest.mark.parametrize("seed", [*SEEDS, 2**64 - 2, 2**100, -(2**70)])
def test_any_integer_is_a_seed(oracle: Oracle, seed: int) -> None:
    params = [SamplingParams(max_tokens=12, ignore_eos=True, seed=seed)]
    assert drawn(oracle, params) == drawn(oracle, params)


def test_other_seeds_draw_other_tokens(oracle: Oracle) -> None:
    params = [SamplingParams(max_tokens=12, ignore_eos=True, seed=seed) for seed in SEEDS]
    llm = LLM(str(oracle("plain").folder), num_kv_blocks=64)
    outputs = tokens(llm.generate([oracle("plain").prompts[4]] * len(SEEDS), params, use_tqdm=False))
    assert len({tuple(row) for row in outputs}) == len(SEEDS)


def test_requests_without_a_seed_differ_and_follow_the_engines(oracle: Oracle) -> None:
    def sample(seed: int) -> list[list[int]]:
        llm = LLM(str(oracle("plain").folder), num_kv_blocks=64, seed=seed)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        return tokens(llm.generate([oracle("plain").prompts[4]] * 4, params, use_tqdm=False))

    assert sample(0) == sample(0)
    assert len({tuple(row) for row in sample(0) + sample(1)}) == 8


def test_greedy_rows_are_unaffected_by_random_ones(oracle: Oracle) -> None:
    params = [greedy() if i % 2 else SamplingParams(max_tokens=20, ignore_eos=True, top_k=5) for i in range(12)]
    outputs = drawn(oracle, params, max_num_batched_tokens=20, max_num_seqs=8)
    assert outputs[1::2] == oracle("plain").outputs[1:12:2]
    assert all(a != b for a, b in zip(outputs[::2], oracle("plain").outputs[:12:2], strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_draw_from_their_parts(ranks: int) -> None:
    """All of them what one draws from all logits, the first of several that are best included."""
    logits = random_scores(0, 40, 64, 3.0).round()
    numbers = torch.arange(40)
    temperature = torch.tensor([0, 0.3, 1, 2.5])[numbers % 4]
    expected = sample(logits, temperature, numbers - 3, numbers * 37)

    def draw(parallel: ParallelContext) -> torch.Tensor:
        part = logits.chunk(ranks, -1)[parallel.rank]
        return sample(part, temperature, numbers - 3, numbers * 37, parallel=parallel)

    for drawn in on_ranks(ranks, draw):
        assert torch.equal(drawn, expected)
