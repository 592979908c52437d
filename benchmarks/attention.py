"""Attention kernels beside what the card can do: bytes of keys and values read a second, and prefill FLOP/s.

    python benchmarks/attention.py                    every backend that can serve here, as a table
    python benchmarks/attention.py --json out.json    the figures too
    python benchmarks/attention.py --tune             search the settings of `triton_settings.py` and of `flash.py`

Contexts are random, 300 to 1600 tokens, 8 KV heads of 128, bfloat16. A decode figure is the time of one layer within a
CUDA graph of many layers, each with its own cache, more than the L2 cache holds together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.attention import nanoflow_attention_backends
from nanoflow.plugins.attention.options import FlashConfig
from nanoflow.plugins.attention.triton.backend import TritonAttention, limits
from nanoflow.plugins.attention.triton.decode import TritonDecode
from nanoflow.plugins.attention.triton.prefill import TritonPrefill
from nanoflow.plugins.attention.triton.settings import DecodeSettings, PrefillSettings

DECODES = [(1, 2), (8, 2), (32, 2), (64, 2), (128, 2), (256, 2), (256, 4)]  # sequences, query heads a KV head
BLOCK_SIZES = [16, 64, 256]
PREFILLS = {
    "1 x 128": [(128, 0)],
    "16 x 1024": [(1024, 0)] * 16,
    "1 x 8192": [(8192, 0)],
    "4 x 512 after 4096": [(512, 4096)] * 4,
    "32 ragged": [(new, 0) for new in np.random.default_rng(0).integers(100, 1024, 32).tolist()],
}
KV_HEADS, HEAD_DIM, MAX_LEN = 8, 128, 4096
NUM_LAYERS = 28  # as many as a model has; far more than the L2 cache holds together, and more than the clock's noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tune", action="store_true", help="search for settings instead")
    parser.add_argument("--backends", nargs="+", default=["triton", "flash"])
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {bandwidth / 1e12:.3f} TB/s", flush=True)
    figures = {"device": torch.cuda.get_device_name(), "read_bandwidth": bandwidth}
    figures |= tune(bandwidth) if args.tune else compare(args.backends, bandwidth)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def compare(names: list[str], bandwidth: float) -> dict:
    """Every backend at every size."""
    decodes, prefills = [], []
    print("\ndecode, one layer: TB/s (share of the card's), microseconds")
    for (num_seqs, group), block_size in itertools.product(DECODES, BLOCK_SIZES):
        cells = []
        for name in names:
            c = context(group, block_size)
            backend = build(name, c)
            if backend is None:
                continue
            seconds, num_bytes = time_decode(backend, c, num_seqs)
            decodes.append((name, num_seqs, group, block_size, seconds, num_bytes))
            rate = num_bytes / seconds
            cells.append(f"{name} {rate / 1e12:5.2f} ({rate / bandwidth:4.0%}) {1e6 * seconds:6.1f}")
        print(f"{num_seqs:4} seqs x {group} heads, blocks of {block_size:3} | " + " | ".join(cells), flush=True)
    print("\nprefill, one layer: TFLOP/s, microseconds")
    for (shape, chunks), block_size in itertools.product(PREFILLS.items(), (16, 256)):
        cells = []
        for name in names:
            c = context(2, block_size, num_layers=1)
            backend = build(name, c)
            if backend is None:
                continue
            seconds, flops = time_prefill(backend, c, chunks)
            prefills.append((name, shape, block_size, seconds, flops))
            cells.append(f"{name} {flops / seconds / 1e12:5.0f} {1e6 * seconds:7.1f}")
        print(f"{shape:20} blocks of {block_size:3} | " + " | ".join(cells), flush=True)
    return {"decode": decodes, "prefill": prefills}


# --- what is measured ---


def context(group: int, block_size: int, num_layers: int = 0) -> AttentionContext:
    return AttentionContext(
        num_layers=num_layers, num_heads=group * KV_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5, block_size=block_size, dtype=torch.bfloat16, device=torch.device("cuda"),
    )  # fmt: skip


def build(name: str, c: AttentionContext, config: object = None) -> AttentionBackend | None:
    """The backend, or None if it can't serve here."""
    component = next(x for x in nanoflow_attention_backends() if x.name == name)
    config = config or component.config()
    if component.available() or component.supports(config, c):
        return None
    return component.build(config, c)


def batch(c: AttentionContext, query_lens: np.ndarray, context_lens: np.ndarray) -> tuple[AttentionInput, int]:
    """A batch with blocks strewn over the cache, and how many blocks it takes."""
    needed = -(-context_lens // c.block_size)
    ids = np.random.default_rng(1).permutation(int(needed.sum())).astype(np.int32)
    width = max(int(needed.max()), MAX_LEN // c.block_size)
    tables_SB = np.zeros((len(needed), width), np.int32)
    for row, (start, count) in enumerate(zip(np.cumsum(needed) - needed, needed, strict=True)):
        tables_SB[row, :count] = ids[start : start + count]
    query_start = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    device = c.device
    inputs = AttentionInput(
        slot_mapping_T=torch.zeros(int(query_lens.sum()), dtype=torch.int64, device=device),
        query_start_S1=torch.from_numpy(query_start).to(device),
        context_lens_S=torch.from_numpy(context_lens.astype(np.int32)).to(device),
        block_tables_SB=torch.from_numpy(tables_SB).to(device),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=len(query_lens) if query_lens.max() == 1 else 0,
    )
    return inputs, len(ids)


def time_decode(backend: AttentionBackend, c: AttentionContext, num_seqs: int) -> tuple[float, int]:
    """Seconds and bytes of keys and values of one layer's decode."""
    context_lens = np.random.default_rng(num_seqs).integers(300, 1601, num_seqs)
    num_bytes = 2 * int(context_lens.sum()) * KV_HEADS * HEAD_DIM * c.dtype.itemsize
    inputs, num_blocks = batch(c, np.ones(num_seqs, np.int64), context_lens)
    give_cache(backend, c, NUM_LAYERS, num_blocks)
    query = torch.randn(num_seqs, c.num_heads, HEAD_DIM, dtype=c.dtype, device=c.device)
    backend.timed = inputs, query, num_bytes
    return replay_seconds(lambda: step(backend, inputs, query, NUM_LAYERS)) / NUM_LAYERS, num_bytes


def step(backend: AttentionBackend, inputs: AttentionInput, query: torch.Tensor, num_layers: int) -> list[torch.Tensor]:
    """Plan, and attend in each layer."""
    backend.plan(inputs)
    return [backend.attend(layer, query) for layer in range(num_layers)]


def time_prefill(backend: AttentionBackend, c: AttentionContext, chunks: list[tuple[int, int]]) -> tuple[float, float]:
    """Seconds and FLOPs of one layer's prefill."""
    query_lens = np.array([new for new, _ in chunks])
    context_lens = np.array([new + past for new, past in chunks])
    pairs = sum(new * past + new * (new + 1) // 2 for new, past in chunks)
    inputs, num_blocks = batch(c, query_lens, context_lens)
    give_cache(backend, c, 4, num_blocks)
    query = torch.randn(int(query_lens.sum()), c.num_heads, HEAD_DIM, dtype=c.dtype, device=c.device)
    return replay_seconds(lambda: step(backend, inputs, query, 4)) / 4, 4 * HEAD_DIM * c.num_heads * pairs


def give_cache(backend: AttentionBackend, c: AttentionContext, num_layers: int, num_blocks: int) -> None:
    """A cache of random numbers: zeros take less power, and so run faster than real content."""
    shape = (num_blocks, c.num_kv_heads, c.block_size, c.head_dim)
    backend.keys, backend.values = (
        [torch.randn(shape, dtype=c.dtype, device=c.device) for _ in range(num_layers)] for _ in range(2)
    )


def replay_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time of `work` in a CUDA graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        torch.cuda.synchronize()
        graph.capture_begin()
        kept = work()
        graph.capture_end()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    del kept
    return statistics.median(times)


@triton.jit
def read_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Adds up what it reads, so that no load can be left out."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        total += tl.load(x_ptr + start + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth() -> float:
    """Bytes a second that the card reads, the best of a few kernels."""
    x = torch.randint(-9, 9, (2**30,), dtype=torch.int32, device="cuda")
    out = torch.empty(2**18, dtype=torch.int32, device="cuda")
    times = [replay_seconds(lambda: torch.sum(x, dtype=torch.int32))]
    for block, steps, warps in [(4096, 4, 4), (4096, 16, 4), (8192, 8, 8), (2048, 8, 2)]:
        grid = (x.numel() // (block * steps),)
        times.append(
            replay_seconds(lambda: read_kernel[grid](x, out, x.numel(), BLOCK=block, STEPS=steps, num_warps=warps))  # noqa: B023
        )
    return x.numel() * 4 / min(times)


# --- the search for settings ---

TUNED_DECODES = [(1, 2), (8, 2), (32, 2), (64, 2), (128, 2), (256, 2), (256, 4)]
WAVES = [1, 2, 4, 8]


def decode_candidates() -> Iterator[DecodeSettings]:
    sizes = ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4))
    for (block_n, num_warps), num_stages, ahead in itertools.product(sizes, (1, 2, 3), (0, 64)):
        yield DecodeSettings(block_n, num_warps, num_stages, 2, ahead=ahead)


def prefill_candidates() -> Iterator[PrefillSettings]:
    for block_m, block_n, num_warps, num_stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
        settings = PrefillSettings(block_m, block_n, num_warps, num_stages)
        if settings.shared_memory(2 * HEAD_DIM) <= 227 * 1024 and (block_m, num_warps) != (64, 8):
            yield settings


def compile_one(job: tuple[DecodeSettings | PrefillSettings, int, int]) -> None:
    """Run one setting on a tiny batch, so that its kernel is in Triton's cache on disk."""
    settings, group, block_size = job
    c = context(group, block_size, num_layers=1)
    backend = TritonAttention(NoOptions(), c)
    use(backend, settings)
    decode = isinstance(settings, DecodeSettings)
    inputs, num_blocks = batch(c, np.array([1 if decode else 3]), np.array([40]))
    give_cache(backend, c, 1, num_blocks)
    backend.plan(inputs)
    backend.attend(0, torch.randn(1 if decode else 3, c.num_heads, HEAD_DIM, dtype=c.dtype, device=c.device))


def use(backend: TritonAttention, settings: DecodeSettings | PrefillSettings) -> None:
    """Make `backend` run with `settings`."""
    if isinstance(settings, PrefillSettings):
        backend.prefiller = TritonPrefill(backend.context, settings)
    else:
        backend.decoder = TritonDecode(backend.context, settings, limits(backend.context.device)[0])
        backend.plan_decode = lambda inputs: setattr(backend, "shares", {None: backend.decoder.shares(inputs)})


def tune(bandwidth: float) -> dict:
    """Time all candidates at all sizes; print the best of each."""
    decode, prefill = list(decode_candidates()), list(prefill_candidates())
    jobs = [(s, group, size) for s in decode for group, size in ((2, 256), (2, 16), (4, 256))]
    jobs += [(s, 2, size) for s in prefill for size in (256, 16)]
    workers = min(12, max(1, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs, chunksize=4))
    found: dict[str, list] = {"decode": [], "splits": [], "prefill": []}
    print("\ndecode: block_n, warps, stages, waves -> share of the card's bandwidth")
    for (num_seqs, group), block_size in [*((d, 256) for d in TUNED_DECODES), ((32, 2), 16), ((256, 2), 16)]:
        results = []
        c = context(group, block_size)
        backend = TritonAttention(NoOptions(), c)
        for settings, waves in itertools.product(decode, WAVES):
            use(backend, one := replace(settings, waves=waves))
            seconds, num_bytes = retime(backend, c, num_seqs)
            results.append((num_bytes / seconds / bandwidth, one))
        del backend.timed
        results.sort(key=lambda r: -r[0])
        found["decode"] += [(num_seqs, group, block_size, share, *describe(s)) for share, s in results]
        top = "  ".join(f"{share:.1%} {describe(s)}" for share, s in results[:6])
        print(f"{num_seqs:4} x {group}, blocks of {block_size:3}: {top}", flush=True)
    print("\nFlashAttention's num_splits -> share of the card's bandwidth")
    for num_seqs, group in TUNED_DECODES:
        c = context(group, 256)
        cells = []
        for num_splits in (1, 2, 4, 8, 32):
            backend = build("flash", c, FlashConfig(num_splits=num_splits))
            if backend is None:
                break
            seconds, num_bytes = time_decode(backend, c, num_seqs)
            found["splits"].append((num_seqs, group, num_splits, num_bytes / seconds / bandwidth))
            cells.append(f"{num_splits}: {num_bytes / seconds / bandwidth:.1%}")
        print(f"{num_seqs:4} x {group}: " + "  ".join(cells), flush=True)
    print("\nprefill: block_m, block_n, warps, stages -> TFLOP/s")
    for shape, block_size in itertools.product(PREFILLS, (256, 16)):
        results = []
        for settings in prefill:
            backend = TritonAttention(NoOptions(), c := context(2, block_size, num_layers=1))
            use(backend, settings)
            seconds, flops = time_prefill(backend, c, PREFILLS[shape])
            results.append((flops / seconds / 1e12, settings))
        results.sort(key=lambda r: -r[0])
        found["prefill"] += [(shape, block_size, rate, *describe(s)) for rate, s in results]
        top = "  ".join(f"{rate:.0f} {describe(s)}" for rate, s in results[:4])
        print(f"{shape:20} blocks of {block_size:3}: {top}", flush=True)
    return found


def retime(backend: TritonAttention, c: AttentionContext, num_seqs: int) -> tuple[float, int]:
    """As `time_decode`, with the batch and the cache of the call before."""
    if not hasattr(backend, "timed"):
        return time_decode(backend, c, num_seqs)
    inputs, query, num_bytes = backend.timed
    return replay_seconds(lambda: step(backend, inputs, query, NUM_LAYERS), repeats=3) / NUM_LAYERS, num_bytes


def describe(settings: DecodeSettings | PrefillSettings) -> tuple:
    return tuple(getattr(settings, name) for name in settings.__slots__)


if __name__ == "__main__":
    main()
