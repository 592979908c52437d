"""Each kernel against the plain PyTorch of its operation, at any shape, on a GPU or under Triton's interpreter.

Results are compared with that one's in float32 on the same values: the relative error ‖out - ref‖ / ‖ref‖ must stay
under the dtype's bound. What a kernel writes into is poisoned first, and inputs are views with odd strides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from nanoflow.core.data.attention_input import Projection
from nanoflow.core.data.parallel import Group, ParallelContext
from nanoflow.core.execution.pinned_io import PinnedIO
from nanoflow.core.execution.step_buffer import StepBuffer
from nanoflow.core.kernels import allreduce_rmsnorm as ranks
from nanoflow.core.kernels import experts, norm, rotary, sampling, step_inputs
from nanoflow.core.kernels.embedding import embedding
from nanoflow.core.kernels.filters import thresholds
from nanoflow.core.kernels.gemm.gemv import gemv
from nanoflow.core.kernels.gemm.settings import GemvConfig, SkinnyConfig, TiledConfig, TmaConfig
from nanoflow.core.kernels.gemm.silu_mul import silu_mul
from nanoflow.core.kernels.gemm.skinny import skinny_gemm
from nanoflow.core.kernels.gemm.tiled import tiled_gemm
from nanoflow.core.kernels.gemm.tma import tma_gemm
from nanoflow.core.kernels.logits import adjust_logits
from nanoflow.core.ops import Ops
from nanoflow.core.ops.attention import apply_rotary
from nanoflow.core.ops.experts import mix_chosen, route
from nanoflow.core.ops.filters import Filters, keep_likely, keep_top
from nanoflow.core.ops.linear import linear
from nanoflow.core.ops.sampling import gumbel_noise
from nanoflow.testing.ranks import on_ranks

PLAIN = Ops()
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    bound = BOUNDS[dtype] if out.is_cuda or dtype != torch.bfloat16 else 2 * BOUNDS[dtype]  # the interpreter truncates
    out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
    assert out.shape == expected.shape
    error = (out - expected).norm() / expected.norm()
    assert error < bound, f"relative error {error:.2e}"


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.to(device, dtype)


def strided(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Random, with rows that are 16 elements further apart than they need be."""
    return random(*shape[:-1], shape[-1] + 16, dtype=dtype, device=device, seed=seed)[..., : shape[-1]]


def poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations on a GPU get."""
    if device != "cpu":
        for size in (2**10, 2**14, 2**18, 2**22):
            torch.full((size,), torch.nan, device=device)


def check_embedding(tokens: int, size: int, width: int, dtype: torch.dtype, device: str) -> None:
    """In the whole table, and in parts of it, each of which gives 0 for the other's tokens."""
    table = random(size, width, dtype=dtype, device=device, seed=1)
    ids = torch.randint(size, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(device)
    poison(device)
    assert embedding(ids, table).equal(table[ids])
    for embed in (embedding, PLAIN.embedding):
        for first in (None, 0, 5):
            assert embed(torch.full_like(ids, -1), table, first).isfinite().all(), "no token, and no harm"
    first, second = embedding(ids, table[: size // 2]), embedding(ids, table[size // 2 :], size // 2)
    assert (first + second).equal(table[ids])
    assert first[ids >= size // 2].count_nonzero() == second[ids < size // 2].count_nonzero() == 0


def check_norm(rows: int, size: int, parts: int, dtype: torch.dtype, device: str) -> None:
    residual = strided(rows, size, dtype=dtype, device=device, seed=1)
    weight = random(size, dtype=dtype, device=device, seed=2)
    x = None
    if parts == 1:
        x = strided(rows, size, dtype=dtype, device=device, seed=3)
    elif parts > 1:
        x = random(parts, rows, size, dtype=torch.float32, device=device, seed=3)
    total = residual.float() + (0 if x is None else x.float().reshape(-1, rows, size).sum(0))
    poison(device)
    out, summed = norm.add_rms_norm(x, residual, weight, 1e-6)
    close(summed, total, dtype)
    close(out, F.rms_norm(total.to(dtype).float(), (size,), weight.float(), 1e-6), dtype)


def check_sums(
    calls: list[tuple[int, int, int]], dtype: torch.dtype, device: str, rank: int, addresses: torch.Tensor,
    most_words: int,
) -> None:  # fmt: skip
    """One rank's part of `calls`, each (rows, size, parts), in the order of all ranks.

    Args:
        rank: this one.
        addresses: int64, of all ranks' inboxes, which are empty.
        most_words: that fit into them, from each rank.
    """
    counter = torch.zeros(8, dtype=torch.int32, device=device)
    left = torch.zeros(1, dtype=torch.int32, device=device)
    for number, (rows, size, parts) in enumerate(calls):
        kind = {"dtype": dtype, "device": device}
        residual = strided(rows, size, **kind, seed=number)
        weight = random(size, **kind, seed=number)
        if parts == 1:
            xs = [strided(rows, size, **kind, seed=number + other) for other in range(len(addresses))]
        else:
            xs = [
                random(parts, rows, size, dtype=torch.float32, device=device, seed=number + other)
                for other in range(len(addresses))
            ]
        total = residual.float() + sum(x.float().reshape(-1, rows, size).sum(0) for x in xs)
        poison(device)
        out, summed = ranks.allreduce_add_rms_norm(
            xs[rank], residual, weight, 1e-6, addresses, counter, left, rank, most_words,
            owned=rows >= len(addresses) and number % 2 == 0,
        )  # fmt: skip
        close(summed, total, dtype)
        close(out, F.rms_norm(total.to(dtype).float(), (size,), weight.float(), 1e-6), dtype)
    assert counter.tolist() == [len(calls)] * len(counter)


def check_gate(rows: int, size: int, dtype: torch.dtype, device: str) -> None:
    x = strided(rows, 2 * size, dtype=dtype, device=device)
    poison(device)
    close(silu_mul(x), F.silu(x[:, :size].float()) * x[:, size:].float(), dtype)


def check_rotary(
    tokens: int, heads: int, kv_heads: int, head_dim: int, block_size: int, has_norm: bool, dtype: torch.dtype,
    device: str,
) -> None:  # fmt: skip
    """Keys and values are interleaved in one cache; the last token is padding."""
    generator = torch.Generator().manual_seed(tokens)
    num_blocks = tokens // block_size + 3
    qkv = strided(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    q_weight, k_weight = random(2, head_dim, dtype=dtype, device=device, seed=5) if has_norm else (None, None)
    angles = torch.rand(64, head_dim // 2, generator=generator).to(device) * 6
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    positions = torch.randint(64, (tokens,), generator=generator).to(device)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens].to(device)
    slots[-1] = -1
    cache = torch.full((num_blocks, 2, kv_heads, block_size, head_dim + 16), torch.nan, dtype=dtype, device=device)
    keys, values = (cache[:, i, ..., :head_dim].transpose(1, 2) for i in (0, 1))
    poison(device)
    projection = Projection(qkv, q_weight, k_weight, 1e-6, cos, sin, positions)
    query = rotary.norm_rotate_store(projection, slots, keys, values)

    split = qkv.float().unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    q, k = split[:2]
    if has_norm:
        q, k = (F.rms_norm(x, (head_dim,), w.float(), 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    table = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    close(query, apply_rotary(q, *table), dtype)
    blocks, places = slots[:-1] // block_size, slots[:-1] % block_size
    close(keys[blocks, places], apply_rotary(k, *table)[:-1], dtype)
    close(values[blocks, places], split[2][:-1], dtype)
    assert cache.isfinite().sum() == 2 * (tokens - 1) * kv_heads * head_dim, "nothing else is written"


def check_gemv(
    outputs: int, size: int, gated: bool, normed: bool, bias: bool, config: GemvConfig, dtype: torch.dtype,
    device: str,
) -> None:  # fmt: skip
    x = random(1, size, dtype=dtype, device=device, seed=1)
    weight = strided(outputs, size, dtype=dtype, device=device, seed=2) / size**0.5
    b = random(outputs, dtype=dtype, device=device, seed=3) if bias else None
    norm_weight = random(size, dtype=dtype, device=device, seed=4)
    hidden = F.rms_norm(x.float(), (size,), norm_weight.float(), 1e-6) if normed else x.float()
    expected = in_float32(hidden, weight, b, gated)
    options = {"norm": (norm_weight, 1e-6) if normed else None}
    poison(device)
    close(gemv(x, weight, b, config, gate=gated, **options), expected, dtype)
    if not gated:
        residual = random(1, outputs, dtype=dtype, device=device, seed=5)
        total = residual.float() + expected.to(dtype).float()
        assert gemv(x, weight, b, config, **options, residual_MN=residual) is residual
        close(residual, total, dtype)


def check_skinny_gemm(
    rows: int, outputs: int, size: int, gated: bool, normed: bool, bias: bool, config: SkinnyConfig,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    x = strided(rows, size, dtype=dtype, device=device, seed=1)
    weight = strided(outputs, size, dtype=dtype, device=device, seed=2) / size**0.5
    b = random(outputs, dtype=dtype, device=device, seed=3) if bias else None
    norm_weight = random(size, dtype=dtype, device=device, seed=4)
    hidden = F.rms_norm(x.float(), (size,), norm_weight.float(), 1e-6).to(dtype) if normed else x
    expected = in_float32(hidden, weight, b, gated)
    options = {"gate": gated, "norm": (norm_weight, 1e-6) if normed else None}
    poison(device)
    close(skinny_gemm(x, weight, b, config, **options), expected, dtype)
    if not (gated or normed or bias):
        parts = skinny_gemm(x, weight, None, replace(config, splits=3))
        assert (parts.shape[0], parts.dtype) == (3, torch.float32)
        close(parts.sum(0), expected, dtype)
    if not gated:
        residual = random(rows, outputs, dtype=dtype, device=device, seed=5)
        total = residual.float() + expected.to(dtype).float()
        assert skinny_gemm(x, weight, b, config, **options, residual_MN=residual) is residual
        close(residual, total, dtype)


def check_gemm(
    rows: int, outputs: int, size: int, gated: bool, bias: bool, config: TiledConfig | TmaConfig, dtype: torch.dtype,
    device: str,
) -> None:  # fmt: skip
    """Behind the rows of x is memory with NaN in it."""
    behind = torch.full((rows + config.tokens, size + 16), torch.nan, dtype=dtype, device=device)
    x = behind[:rows, :size].copy_(random(rows, size, dtype=dtype, device=device, seed=1))
    weight = strided(outputs, size, dtype=dtype, device=device, seed=2) / size**0.5
    b = random(outputs, dtype=dtype, device=device, seed=3) if bias else None
    poison(device)
    gemm = tiled_gemm if isinstance(config, TiledConfig) else tma_gemm
    y = gemm(x, weight, b, config, gate=gated)
    if config.splits > 1:
        assert 1 < y.shape[0] <= config.splits
        assert y.dtype == torch.float32
        y = y.sum(0)
    close(y, in_float32(x, weight, b, gated), dtype)


def in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    return linear(x.float(), weight.float(), None if bias is None else bias.float(), gate=gated)


def check_experts(
    tokens: int, size: int, inner: int, num_experts: int, num_chosen: int, renormalize: bool,
    config: experts.GroupedConfig | None, dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    """Routing, sorting and GEMMs; some experts get many tokens and some none."""
    generator = torch.Generator().manual_seed(tokens)
    x = strided(tokens, size, dtype=dtype, device=device, seed=1)
    # No two logits of a token are alike, so that there is one right choice.
    logits = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(tokens)]) * 4.0 / num_experts
    logits[:, 0] += 8 * (torch.rand(tokens, generator=generator) < 0.5)
    logits = F.pad(logits, (0, 16)).to(device, dtype)[:, :num_experts]
    gate_up = random(num_experts, 2, inner, size, dtype=dtype, device=device, seed=2) / size**0.5
    down = random(num_experts, size, inner, dtype=dtype, device=device, seed=3) / inner**0.5
    weights, chosen = route(logits, num_chosen, renormalize=renormalize)
    poison(device)
    found_weights, found_chosen, counts = experts.route(logits, num_chosen, renormalize=renormalize)
    assert torch.equal(found_chosen, chosen.int())
    torch.testing.assert_close(found_weights, weights)
    assert torch.equal(counts, torch.bincount(chosen.flatten(), minlength=num_experts).int())
    assert torch.equal(experts.sort(found_chosen, counts), chosen.flatten().argsort(stable=True).int())
    poison(device)
    out = experts.mix_experts(x, logits, gate_up, down, num_chosen, renormalize=renormalize, config=config)
    assert (out.shape, out.dtype) == ((num_chosen, tokens, size), dtype)
    expected = mix_chosen(x.float(), weights, chosen, gate_up.float(), down.float())
    close(out.float().sum(0), expected, dtype)
    residual, ones = random(tokens, size, dtype=dtype, device=device, seed=4), x.new_ones(size)
    _, total = norm.add_rms_norm(out, residual.clone(), ones, 1e-6)
    close(total, expected + residual.float(), dtype)


def check_draw(rows: int, size: int, dtype: torch.dtype, device: str, ties: bool = False) -> None:
    """The drawn candidate has plain PyTorch's highest score, up to rounding, and most often it is the same one."""
    logits = strided(rows, size, dtype=dtype, device=device) * 3
    if ties:
        logits = logits.round()
    temperature = torch.tensor([0, 0.3, 1, 2.5])[torch.arange(rows) % 4]
    seed = torch.tensor([0, 1, -1, -(2**63), 2**40 + 5])[torch.arange(rows) % 5]
    position = torch.arange(rows) * 37
    poison(device)
    drawn = sampling.draw(logits, temperature.to(device), seed.to(device), position.to(device)).cpu()
    scores = logits.float().cpu()
    noise = gumbel_noise(seed.unsqueeze(-1), position.unsqueeze(-1), size)
    random_rows = temperature > 0
    scores[random_rows] = scores[random_rows] / temperature[random_rows].unsqueeze(-1) + noise[random_rows]
    best, expected = scores.max(-1)
    assert torch.equal(drawn[~random_rows], logits.cpu().argmax(-1)[~random_rows])
    assert (scores.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) >= best - 1e-4).all()
    assert (drawn != expected).sum() <= rows // 50


class InTurn(Group):
    """Ranks that run one after the other, twice: what they exchange is complete the second time."""

    def __init__(self, size: int) -> None:
        self.size, self.parts = size, list[torch.Tensor]()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.parts.append(x)
        return torch.cat((self.parts * self.size)[: self.size], -1)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def broadcast(self, x: torch.Tensor) -> None:
        raise NotImplementedError


def rows_without_a_token(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, size], and in which rows nothing can be sampled."""
    finite = random(size, dtype=torch.float32, device="cpu")
    rows, spoilt = [finite], [False]
    for place in (0, size // 2, size - 1):
        for value in (torch.nan, torch.inf, -torch.inf):
            rows.append(finite.index_fill(0, torch.tensor([place]), value))
            spoilt.append(value != -torch.inf)
    rows += [torch.full((size,), value) for value in (torch.nan, torch.inf, -torch.inf)]
    return torch.stack(rows * 2), torch.tensor([*spoilt, True, True, True] * 2)


def check_no_token(size: int, ranks: int, dtype: torch.dtype, device: str) -> None:
    """NaN and infinity give -1, by the kernel and its reference, with and without filters, and by ranks."""
    logits, spoilt = rows_without_a_token(size)
    logits, rows = logits.to(device, dtype), len(logits)
    temperature = torch.tensor([0.0, 1.0]).repeat_interleave(rows // 2).to(device)
    numbers = torch.arange(rows, device=device)
    own, full = torch.full((rows,), 5, device=device), torch.ones(rows, device=device)
    for filters in (None, Filters(own, full * 0.9, full * 0.1)):
        for sample in (sampling.sample, PLAIN.sample):
            drawn = sample(logits, temperature, numbers, numbers, filters).cpu()
            assert torch.equal(drawn == -1, spoilt)
            assert (drawn < size).all()
    last_token = torch.zeros(rows, dtype=torch.int64, device=device)

    def draw_part(sample: Any, parallel: ParallelContext) -> torch.Tensor:
        part = logits.chunk(ranks, -1)[parallel.rank]
        return sample(part, temperature, numbers, numbers, None, last_token, numbers, parallel=parallel)

    in_turn = [
        ParallelContext(rank, ranks, group) for group in [InTurn(ranks)] for _ in range(2) for rank in range(ranks)
    ]
    by_kernel = [draw_part(sampling.sample, parallel) for parallel in in_turn][ranks:]
    assert torch.equal(last_token, by_kernel[0])
    for drawn in by_kernel + on_ranks(ranks, lambda parallel: draw_part(PLAIN.sample, parallel)):
        assert torch.equal(drawn.cpu() == -1, spoilt)


def check_draw_by_ranks(rows: int, size: int, ranks: int, dtype: torch.dtype, device: str) -> None:
    """Ranks with parts of the logits all draw what one with all of them draws, also where candidates tie."""
    logits = (random(rows, ranks * size, dtype=dtype, device=device) * 3).round()
    numbers = torch.arange(rows, device=device)
    temperature = torch.tensor([0, 0.3, 1, 2.5])[torch.arange(rows) % 4].to(device)
    poison(device)
    expected = sampling.draw(logits, temperature, numbers - 3, numbers * 37)
    group = InTurn(ranks)
    for turn in range(2):
        for rank, part in enumerate(logits.chunk(ranks, -1)):
            parallel = ParallelContext(rank, ranks, group)
            drawn = sampling.draw(part, temperature, numbers - 3, numbers * 37, parallel=parallel)
            assert turn == 0 or torch.equal(drawn, expected)


def check_filters(rows: int, size: int, dtype: torch.dtype, device: str, ties: bool = False) -> None:
    """The kept candidates are plain PyTorch's, computed in double precision, but for calls closer than 1e-6."""
    generator = torch.Generator().manual_seed(size)

    def choice(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=generator)]

    logits = strided(rows, size, dtype=dtype, device=device) * 4
    if ties:
        logits = logits.round()
    temperature = choice([0, 0.4, 1, 1.5], torch.float32)
    filters = Filters(
        choice([1, 2, 20, size // 2, size, 2**62], torch.int64), choice([1e-30, 0.3, 0.95, 0.999, 1], torch.float32),
        choice([0, 0, 0.02, 0.5, 1], torch.float32),
    )  # fmt: skip
    limits = (filters.top_k_S, filters.top_p_S, filters.min_p_S)
    lowest = thresholds(logits, temperature.to(device), *(limit.to(device) for limit in limits)).cpu()
    scores = (logits.float().cpu() / temperature.clamp(min=1e-10).unsqueeze(-1)).double()
    kept = logits.float().cpu() >= lowest.unsqueeze(-1)
    bounds = []
    for slack in (-1e-6, 1e-6):
        top_p, min_p = filters.top_p_S.double(), filters.min_p_S.double()
        top_p = torch.where(top_p < 1, top_p + slack, 1.0)
        top = keep_top(scores, filters.top_k_S.unsqueeze(-1), top_p.unsqueeze(-1))
        bounds.append(keep_likely(top, (min_p * (1 - slack)).unsqueeze(-1)) > -torch.inf)
    random_rows = temperature > 0
    assert (kept | ~bounds[0])[random_rows].all(), "something is missing"
    assert (bounds[1] | ~kept)[random_rows].all(), "something is kept that should not be"
    seed, position = torch.arange(rows), torch.arange(rows) + 7
    drawn = sampling.draw(logits, *(x.to(device) for x in (temperature, seed, position, lowest)))
    assert kept[random_rows].gather(-1, drawn.cpu()[random_rows].unsqueeze(-1)).all()


def check_adjust(rows: int, size: int, dtype: torch.dtype, device: str, biased: bool, penalized: bool) -> None:
    """Rows with and without a bias and penalties; what rows without have in the tables must not matter."""
    generator = torch.Generator().manual_seed(size)
    logits = strided(rows, size, dtype=dtype, device=device) * 4
    places = torch.randperm(rows + 3, generator=generator)[:rows]
    bias = random(rows + 3, size, dtype=torch.float32, device="cpu").where(torch.rand(rows + 3, size) > 0.1, -torch.inf)
    counts = torch.randint(7, (rows + 3, size), generator=generator).int()
    penalties = torch.tensor([[1.0, 1.5, 0.7, 1.0], [0.0, 0.5, -1.0, 0.0], [0.0, 0.25, 0.0, 2.0]])
    penalties = penalties[:, torch.arange(rows) % 4].contiguous()
    which = torch.arange(rows) % 3 > 0
    bias[places[~which]] = torch.nan
    tables = bias if biased else None, penalties, counts if penalized else None
    expected = PLAIN.adjust_logits(logits.cpu(), places, which, *tables)
    poison(device)
    on_device = [None if table is None else table.to(device) for table in tables]
    scores = adjust_logits(logits, places.to(device), which.to(device), *on_device)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-6, atol=1e-6)
    if not penalized and not biased:
        assert torch.equal(scores, logits.float())
    neutral = (torch.arange(rows) % 4 == 0) & (~which if biased else True)
    assert torch.equal(scores.cpu()[neutral], logits.float().cpu()[neutral])


def check_gather_step_inputs(num_tokens: int, num_seqs: int, width: int, block_size: int, device: str) -> None:
    """All that the contexts need of the block tables, and everything else, is what plain PyTorch gives."""
    generator = torch.Generator().manual_seed(num_tokens)
    num_slots = num_seqs + 2

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    context_lens = integers(1, width * block_size + 1, num_seqs).int()
    held = (
        integers(-num_slots, 1000, num_tokens), integers(0, 10**5, num_slots),
        torch.randperm(num_slots, generator=generator)[:num_seqs], context_lens,
        integers(0, 10**6, num_slots, width).int(), torch.rand(num_slots, generator=generator),
        integers(-(2**62), 2**62, num_slots),
    )  # fmt: skip
    expected_tables, expected_turn = torch.empty(num_seqs, width, dtype=torch.int32), torch.tensor([6]).int()
    expected = PLAIN.gather_step_inputs(*held, block_size, expected_tables, expected_turn)
    found_tables = torch.full((num_seqs, width), -1, dtype=torch.int32, device=device)
    turn = torch.tensor([6], dtype=torch.int32, device=device)
    found = step_inputs.gather_step_inputs(*(x.to(device) for x in held), block_size, found_tables, turn)
    assert turn.item() == expected_turn.item() == 7
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    needed = torch.arange(width) < (-(-context_lens // block_size)).unsqueeze(-1)
    assert torch.equal(found_tables.cpu(), expected_tables.where(needed, -1))


def check_pinned_io(num_tokens: int, num_seqs: int, device: str) -> None:
    """Steps in a row, each by the kernels: what the host wrote arrives, and what was drawn comes back."""
    ops = replace(PLAIN, receive=step_inputs.receive)
    pinned_io = PinnedIO(num_tokens, num_seqs, torch.device(device), ops)
    integers, reals = torch.zeros(num_seqs, dtype=torch.int64, device=device), torch.zeros(num_seqs, device=device)
    tables = torch.zeros(num_seqs, 1, dtype=torch.int32, device=device)
    posted = []
    for turn in range(5):
        generator = torch.Generator().manual_seed(turn)
        T = num_tokens - turn % 2
        host, buffer = pinned_io.open(T, num_seqs), StepBuffer(T, num_seqs, torch.device(device))
        host.memory.random_(256, generator=generator)
        pinned_io.receive(buffer)
        assert torch.equal(buffer.memory.cpu(), host.memory)
        step_inputs.gather_step_inputs(
            integers, integers, integers, integers.int(), tables, reals, integers, 16, tables.clone(), pinned_io.turn_1
        )
        logits = torch.randn(num_seqs, 300, generator=generator).to(device)
        drawn = sampling.draw(
            logits, reals, integers, integers, outbox=pinned_io.outbox, turn_1=pinned_io.turn_1
        )  # fmt: skip
        tokens, done = pinned_io.send()
        if done is not None:
            done.synchronize()
        posted.append((tokens, drawn.cpu()))
        for earlier, expected in posted[-2:]:  # the one before is still there
            assert torch.equal(earlier[:num_seqs], expected)
    assert int(pinned_io.turn_1) == pinned_io.num_sent == 5
