"""Kernels in Triton's interpreter, at small and odd shapes; `tests/gpu` runs them on a GPU."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from nanoflow.core.kernels import allreduce_rmsnorm as ranks
from nanoflow.core.kernels.experts import GroupedConfig
from nanoflow.core.kernels.gemm.settings import GemvConfig, SkinnyConfig, TiledConfig, TmaConfig
from nanoflow.plugins.attention.options import interpreted
from tests.core.kernels import checks

pytestmark = pytest.mark.skipif(not interpreted(), reason="Triton compiles for a GPU here")
DTYPES = [torch.float32, torch.bfloat16]
TILED = TiledConfig(tokens=16, rows=16, columns=32, splits=1, num_warps=4, num_stages=2)
TMA = TmaConfig(tokens=16, rows=16, columns=32, splits=1, num_warps=4, num_stages=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (5, 70), (3, 5000)])
def test_embedding(tokens: int, width: int, dtype: torch.dtype) -> None:
    checks.check_embedding(tokens, 12, width, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "parts"), [(3, 70, 0), (1, 64, 1), (3, 100, 1), (2, 48, 3)])
def test_norm(rows: int, size: int, parts: int, dtype: torch.dtype) -> None:
    checks.check_norm(rows, size, parts, dtype, "cpu")


def sum_over_ranks(size: int, calls: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """Ranks as processes, each of which compares what it gets."""
    inboxes = torch.full((size, 2, size, 400), -1, dtype=torch.int32).share_memory_()
    addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes])
    processes = [
        get_context("fork").Process(target=checks.check_sums, args=(calls, dtype, "cpu", rank, addresses, 400))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    assert (inboxes == -1).all(), "whoever has read a word empties it"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sum_over_ranks(size: int, dtype: torch.dtype) -> None:
    """Calls of different shapes one after the other; rows have owners in every other one."""
    calls = [(3, 70, 1), (1, 70, 2), (4, 34, 3), (2, 100, 1), (1, 8, 1), (4, 100, 2), (7, 50, 1), (3, 20, 1), (8, 4, 3)]
    sum_over_ranks(size, calls, dtype)


@pytest.mark.slow
def test_ranks_that_are_late_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a call, or between sending and reading; the others run ahead, and write nowhere that is yet to be read."""
    delays = random.SystemRandom()  # of which forked ranks have no copies
    receive = ranks.receive

    def late(*args: Any) -> Any:
        if delays.random() < 0.2:
            time.sleep(delays.uniform(0, 0.05))
        return receive(*args)

    monkeypatch.setattr(ranks, "receive", late)
    shapes = random.Random(1)
    calls = [(shapes.choice([1, 3, 4]), shapes.choice([2, 8, 12]), 1) for _ in range(60)]
    sum_over_ranks(3, calls, torch.bfloat16)


def test_a_sum_can_be_left() -> None:
    """It ends without the others' words."""
    inboxes = torch.full((2, 2, 2, 8), -1, dtype=torch.int32)
    left, counter = torch.ones(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    x, residual = torch.ones(1, 8), torch.ones(1, 8)
    x.view(torch.int32)[0, 2] = -1
    addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes])
    _, total = ranks.allreduce_add_rms_norm(x, residual, torch.ones(8), 1e-6, addresses, counter, left, 0, 8)
    assert counter.tolist() == [1] * 4
    assert total.shape == (1, 8)
    assert total.isnan().all(), "the others' words are missing"
    assert (inboxes[1, 0, 0] != -1).all(), "a NaN that would look as if it had not arrived is sent as another"
    sent = inboxes[1, 0, 0].view(torch.float32)
    assert sent.isnan().tolist() == [place == 2 for place in range(8)]
    assert sent.nan_to_num(1).tolist() == [1.0] * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype) -> None:
    checks.check_gate(3, 700, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "block_size", "has_norm"),
    [(5, 4, 2, 16, 4, True), (3, 3, 1, 12, 16, False), (34, 2, 1, 20, 8, True)],
)
def test_rotary(
    tokens: int, heads: int, kv_heads: int, head_dim: int, block_size: int, has_norm: bool, dtype: torch.dtype
) -> None:
    checks.check_rotary(tokens, heads, kv_heads, head_dim, block_size, has_norm, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gated", "normed", "bias"), [(False, False, True), (True, True, False), (True, True, True)])
@pytest.mark.parametrize(("outputs", "size"), [(22, 80), (6, 64)])
def test_gemv(outputs: int, size: int, gated: bool, normed: bool, bias: bool, dtype: torch.dtype) -> None:
    checks.check_gemv(outputs, size, gated, normed, bias, GemvConfig(4, 64, 4), dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter can't multiply bfloat16 matrices
@pytest.mark.parametrize(("gated", "normed", "bias"), [(False, True, True), (True, True, False), (False, False, False)])
@pytest.mark.parametrize(("rows", "outputs", "size"), [(2, 44, 80), (8, 24, 256), (5, 16, 144)])
def test_skinny_gemm(
    rows: int, outputs: int, size: int, gated: bool, normed: bool, bias: bool, dtype: torch.dtype
) -> None:
    checks.check_skinny_gemm(rows, outputs, size, gated, normed, bias, SkinnyConfig(16, 4), dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter can't multiply bfloat16 matrices
@pytest.mark.parametrize(
    ("rows", "outputs", "size", "splits", "gated", "bias"),
    [
        (3, 40, 80, 1, False, True),
        (17, 36, 64, 1, True, False),
        (40, 20, 64, 2, False, False),
        (2, 24, 96, 3, False, False),
        (2, 20, 112, 3, False, False),
    ],
)
def test_gemm(rows: int, outputs: int, size: int, splits: int, gated: bool, bias: bool, dtype: torch.dtype) -> None:
    for config in (replace(TILED, splits=splits), replace(TMA, splits=splits)):
        checks.check_gemm(rows, outputs, size, gated, bias, config, dtype, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "size", "inner", "num_experts", "num_chosen", "renormalize"),
    [(1, 32, 48, 8, 2, True), (5, 40, 24, 7, 3, False), (60, 64, 20, 5, 5, True), (33, 32, 16, 12, 1, False)],
)
def test_experts(
    tokens: int, size: int, inner: int, num_experts: int, num_chosen: int, renormalize: bool, dtype: torch.dtype
) -> None:
    config = GroupedConfig(rows=16, outputs=16, columns=16, num_warps=4, num_stages=2)
    checks.check_experts(tokens, size, inner, num_experts, num_chosen, renormalize, config, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_draw(ties: bool, dtype: torch.dtype) -> None:
    checks.check_draw(9, 2500, dtype, "cpu", ties)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_token_of_logits_that_are_not_finite(ranks: int, dtype: torch.dtype) -> None:
    checks.check_no_token(2600, ranks, dtype, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("size", [300, 1100])  # one chunk, and two
@pytest.mark.parametrize("ranks", [2, 4])
def test_draw_by_ranks(ranks: int, size: int) -> None:
    checks.check_draw_by_ranks(9, size, ranks, torch.bfloat16, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_filters(ties: bool, dtype: torch.dtype) -> None:
    checks.check_filters(12, 1300, dtype, "cpu", ties)


@pytest.mark.parametrize(("num_tokens", "num_seqs", "width"), [(3, 3, 5), (300, 4, 1500)])
def test_gather_step_inputs(num_tokens: int, num_seqs: int, width: int) -> None:
    checks.check_gather_step_inputs(num_tokens, num_seqs, width, 16, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("biased", "penalized"), [(False, False), (True, False), (False, True), (True, True)])
def test_adjust(biased: bool, penalized: bool, dtype: torch.dtype) -> None:
    checks.check_adjust(13, 2500, dtype, "cpu", biased, penalized)


def test_pinned_io() -> None:
    checks.check_pinned_io(700, 5, "cpu")
