"""The layers' Triton kernels beside PyTorch and cuBLAS on a GPU, and against its bandwidth.

    python benchmarks/kernels.py                    # tables, and kernels.json
    python benchmarks/kernels.py --tune             # also try many settings of the matrix kernels, and use the best

Each figure is the median over replays of a CUDA graph of many launches. GEMMs are timed as a model runs them, each
with its own weights, so that none is in L2 from the launch before. The share of bandwidth is bytes read and written /
time / what a plain sum over 4 GB read in this run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput, Projection
from nanoflow.core.kernels.filters import thresholds
from nanoflow.core.kernels.gemm import dispatch
from nanoflow.core.kernels.gemm.gemv import gemv
from nanoflow.core.kernels.gemm.settings import GemmConfig, GemvConfig, TiledConfig, TmaConfig
from nanoflow.core.kernels.gemm.silu_mul import silu_mul
from nanoflow.core.kernels.gemm.tiled import tiled_gemm
from nanoflow.core.kernels.gemm.tma import tma_gemm
from nanoflow.core.kernels.norm import add_rms_norm
from nanoflow.core.kernels.rotary import norm_rotate_store
from nanoflow.core.kernels.sampling import draw
from nanoflow.core.layers import apply_rotary
from nanoflow.core.ops.filters import keep_likely, keep_top
from nanoflow.core.ops.sampling import gumbel_noise
from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.attention.triton.backend import TritonAttention

DEVICE, DTYPE = "cuda", torch.bfloat16
VOCAB_SIZE, HEAD_DIM, BLOCK_SIZE, CONTEXT = 151_936, 128, 256, 384
# hidden, layers, query heads, KV heads, inner
MODELS = {"0.6B": (1024, 28, 16, 8, 3072), "8B": (4096, 36, 32, 8, 12288)}
TUNED_ROWS = (1, 8, 64, 128, 256)

GEMVS = [
    GemvConfig(*values)
    for values in (
        (2, 512, 1), (4, 512, 1), (4, 512, 2), (8, 512, 4), (16, 512, 4), (1, 1024, 4), (2, 1024, 4), (4, 1024, 4),
        (8, 1024, 8), (2, 2048, 4), (4, 2048, 4), (4, 2048, 8), (2, 4096, 4), (4, 4096, 8),
    )
]  # fmt: skip
TILES = {  # for x of so many rows: tokens, rows, columns, warps, stages
    8: (
        (16, 16, 256, 2, 4), (16, 16, 512, 4, 3), (16, 32, 128, 4, 4), (16, 32, 128, 4, 6), (16, 64, 64, 4, 6),
        (64, 32, 128, 4, 4), (64, 32, 128, 4, 6),
    ),
    64: (
        (64, 16, 128, 4, 6), (64, 32, 64, 4, 8), (64, 32, 128, 4, 4), (64, 32, 128, 4, 6), (64, 64, 64, 4, 6),
        (64, 64, 128, 4, 4),
    ),
    128: (
        (64, 32, 64, 4, 6), (64, 32, 128, 4, 4), (64, 32, 256, 4, 4), (64, 64, 64, 4, 3), (64, 64, 128, 4, 4),
        (64, 64, 128, 4, 6), (128, 32, 64, 4, 3), (128, 64, 128, 4, 4), (128, 128, 128, 8, 3),
    ),
    256: (
        (64, 32, 64, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 64, 64, 4, 6), (128, 64, 128, 4, 4),
        (128, 128, 64, 4, 6), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
    ),
}  # fmt: skip
Settings = dict[tuple[int, int, int], GemmConfig | None]  # by outputs, size and rows of x; None is cuBLAS


@dataclass(frozen=True)
class Gemm:
    """One of a model's GEMMs: its shape, and what can be fused with it."""

    name: str
    outputs: int
    size: int
    gate: bool = False
    norm: bool = False

    @property
    def may_split(self) -> bool:
        return self.name in ("o", "down")

    @property
    def bytes(self) -> int:
        return self.outputs * self.size * 2

    def settings(self, rows: int) -> list[Any]:
        if rows == 1:
            return [s for s in GEMVS if s.columns <= max(512, 2 ** (self.size - 1).bit_length())]
        found: list[Any] = [None]
        for (*shape, warps, stages), splits, prefetch in itertools.product(TILES[rows], (1, 2, 4), (False, True)):
            if splits == 1 or (self.may_split and self.size >= splits * shape[-1]):
                how = (*shape, splits, warps, stages)
                found.append(TmaConfig(*how) if rows > 64 else TiledConfig(*how, prefetch))
        return list(dict.fromkeys(found))


def gemms(model: str) -> list[Gemm]:
    hidden, _, heads, kv_heads, inner = MODELS[model]
    return [
        Gemm("qkv", (heads + 2 * kv_heads) * HEAD_DIM, hidden, norm=True),
        Gemm("o", hidden, heads * HEAD_DIM),
        Gemm("gate_up", 2 * inner, hidden, gate=True, norm=True),
        Gemm("down", hidden, inner),
        Gemm("head", VOCAB_SIZE, hidden),
    ]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def seconds(calls: list[Callable[[], Any]], replays: int = 7) -> float:
    """Median time of one call, when all are captured one after the other."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / len(calls)


def read_bandwidth() -> float:
    data = torch.ones(2**30, device=DEVICE)
    return data.nbytes / seconds([lambda: data.sum()] * 3)


def warm(worker: int, workers: int, rows_to_tune: list[int]) -> None:
    """Compile every workers-th setting, so that Triton's cache has it."""
    jobs = {
        (rows, setting, gemm.gate, gemm.norm, gemm.size): gemm
        for gemm in gemms("0.6B") + gemms("8B")
        for rows in rows_to_tune
        for setting in gemm.settings(rows)
        if setting is not None
    }
    for (rows, setting, *_), gemm in list(jobs.items())[worker::workers]:
        x, weight = random(rows, gemm.size), random(min(gemm.outputs, 4096), gemm.size)
        options = {"norm": (random(gemm.size), 1e-6)} if gemm.norm else {}
        try:
            if rows > 1:
                kernel = tma_gemm if rows > 64 else tiled_gemm
                kernel(x, weight, None, setting, gate=gemm.gate)
                continue
            gemv(x, weight, None, setting, gate=gemm.gate, **options)
        except Exception as error:  # more shared memory than there is
            print(f"{setting}: {type(error).__name__}", file=sys.stderr)


def tune(name: str, settings: Settings, bandwidth: float, report: dict[str, Any], deadline: float) -> None:
    """Try each setting of each GEMM in a whole step of the model, one GEMM after the other; keep the best."""
    model = Model(name)
    for rows in report["rows"]:
        model.prepare(rows)
        for gemm in sorted(gemms(name), key=lambda p: -p.bytes if p.name != "head" else 0):
            key = (gemm.outputs, gemm.size, rows)
            found = []
            for setting in gemm.settings(rows):
                if time.monotonic() > deadline:
                    break
                settings[key] = setting
                try:
                    found.append((seconds([model.step_whole], 4) * 1e3, setting))
                except Exception as error:
                    report["failed"].append(f"{name} {gemm.name} {rows} {setting}: {error!r}"[:200])
            found.sort(key=lambda pair: pair[0])
            settings.pop(key, None)
            if found:
                settings[key] = found[0][1]
            report["tuning"][f"{name} {gemm.name} {rows}"] = [(t, repr(s)) for t, s in found]
            tried = "; ".join(f"{t:.3f} {s and (*astuple(s),)}" for t, s in found[:3])
            cublas = next((f"cuBLAS {t:.3f}" for t, s in found if s is None), "")
            print(f"{name:5}{gemm.name:8}{rows:3}  {tried}  {cublas}")
    del model
    torch.cuda.empty_cache()


class Model:
    """A decode step at contexts of `CONTEXT` tokens: its GEMMs alone, without attention, or whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hidden, self.num_layers, self.heads, self.kv_heads, _ = MODELS[name]
        *self.kinds, self.head_kind = gemms(name)
        self.layers = [[random(p.outputs, p.size) / p.size**0.5 for p in self.kinds] for _ in range(self.num_layers)]
        self.head = random(VOCAB_SIZE, self.hidden) / self.hidden**0.5
        self.norm, self.head_norm = random(self.hidden), random(HEAD_DIM)
        angles = torch.rand(1024, HEAD_DIM // 2, device=DEVICE)
        self.cos = angles.cos().repeat(1, 2)
        self.sin = torch.cat((-angles.sin(), angles.sin()), -1)
        self.cache = torch.zeros(2, 8, BLOCK_SIZE, self.kv_heads, HEAD_DIM, device=DEVICE, dtype=DTYPE)
        self.attention = TritonAttention(
            NoOptions(),
            AttentionContext(
                num_layers=self.num_layers, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=HEAD_DIM,
                scale=HEAD_DIM**-0.5, block_size=16, dtype=DTYPE, device=torch.device(DEVICE),
            ),
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.kinds) * self.num_layers + self.head_kind.bytes

    def prepare(self, rows: int) -> None:
        self.rows = rows
        self.inputs = {p.size: random(rows, p.size) for p in self.kinds}
        self.positions = torch.arange(rows, device=DEVICE)
        needed = -(-CONTEXT // 16)
        self.attention.allocate(rows * needed)
        self.attention_input = AttentionInput(
            slot_mapping_T=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
            query_start_S1=torch.arange(rows + 1, dtype=torch.int32, device=DEVICE),
            context_lens_S=torch.full((rows,), CONTEXT, dtype=torch.int32, device=DEVICE),
            block_tables_SB=torch.randperm(rows * needed, device=DEVICE).int().view(rows, needed),
            query_lens=np.ones(rows, np.int64), context_lens=np.full(rows, CONTEXT), num_decodes=rows,
            uniform_decode=True,
        )  # fmt: skip

    def gemms_cublas(self) -> None:
        for weights in self.layers:
            for weight in weights:
                F.linear(self.inputs[weight.shape[1]], weight)
        F.linear(self.inputs[self.hidden], self.head)

    def gemms_ours(self) -> None:
        for weights in self.layers:
            for kind, weight in zip(self.kinds, weights, strict=True):
                dispatch.linear(self.inputs[kind.size], weight, gate=kind.gate, may_split=kind.may_split)
        dispatch.linear(self.inputs[self.hidden], self.head)

    def step_torch(self) -> torch.Tensor:
        x, residual = None, self.inputs[self.hidden]
        cos, sin = self.cos[self.positions].unsqueeze(1), self.sin[self.positions].unsqueeze(1)
        for qkv_proj, o_proj, gate_up, down in self.layers:
            residual = residual if x is None else residual + x
            qkv = F.linear(F.rms_norm(residual, (self.hidden,), self.norm, 1e-6), qkv_proj)
            q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split([self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = (apply_rotary(F.rms_norm(h, (HEAD_DIM,), self.head_norm, 1e-6), cos, sin) for h in (q, k))
            blocks, places = self.positions // BLOCK_SIZE, self.positions % BLOCK_SIZE
            self.cache[0][blocks, places], self.cache[1][blocks, places] = k, v
            residual = residual + F.linear(q.flatten(1), o_proj)
            gate, up = F.linear(F.rms_norm(residual, (self.hidden,), self.norm, 1e-6), gate_up).chunk(2, -1)
            x = F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(residual + x, (self.hidden,), self.norm, 1e-6), self.head)

    def step_ours(self, *, whole: bool = False) -> torch.Tensor:
        x, residual = None, self.inputs[self.hidden].clone()
        if whole:
            self.attention.plan(self.attention_input)
        for layer, (qkv_proj, o_proj, gate_up, down) in enumerate(self.layers):
            qkv, residual = self.norm_linear(x, residual, qkv_proj, False)
            projection = Projection(qkv, self.head_norm, self.head_norm, 1e-6, self.cos, self.sin, self.positions)
            q = self.attention.project_and_attend(layer, projection) if whole else None
            if q is None:
                cache = self.attention.cache(layer) if whole else self.cache
                q = norm_rotate_store(projection, self.positions, cache[0], cache[1])
                q = self.attention.attend(layer, q) if whole else q
            x = self.linear_residual(q.flatten(1), residual, o_proj)
            x, residual = self.norm_linear(x, residual, gate_up, True)
            x = self.linear_residual(x, residual, down)
        return dispatch.linear(add_rms_norm(x, residual, self.norm, 1e-6)[0], self.head)

    def step_whole(self) -> torch.Tensor:
        return self.step_ours(whole=True)

    def norm_linear(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, gate: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if x is None:
            y = dispatch.norm_linear(residual, self.norm, 1e-6, weight, None, gate=gate)
            if y is not None:
                return y, residual
        x, residual = add_rms_norm(x, residual, self.norm, 1e-6)
        return dispatch.linear(x, weight, gate=gate), residual

    def linear_residual(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        if dispatch.linear_residual(x, weight, None, residual) is not None:
            return None
        return dispatch.linear(x, weight, may_split=True)


def steps(name: str, bandwidth: float, report: dict[str, Any]) -> None:
    model = Model(name)
    floor = model.bytes / bandwidth * 1e3
    print(f"\n{name}: a decode step without attention, ms; reading the weights takes {floor:.3f}")
    print(
        f"{'rows':>6}{'GEMMs, cuBLAS':>18}{'ours':>8}{'of band':>9}{'  | all, PyTorch':>16}{'ours':>8}{'of band':>9}"
        f"{'with attention':>17}"
    )
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        model.prepare(rows)
        result = {
            part: seconds([getattr(model, part)], 5) * 1e3
            for part in ("gemms_cublas", "gemms_ours", "step_torch", "step_ours", "step_whole")
        }
        report["steps"][f"{name} {rows}"] = result
        a, b, c, d, e = result.values()
        print(f"{rows:6}{a:18.3f}{b:8.3f}{floor / b:9.0%}{c:16.3f}{d:8.3f}{floor / d:9.0%}{e:17.3f}")
    del model
    torch.cuda.empty_cache()


def small_kernels(bandwidth: float, report: dict[str, Any]) -> None:
    print(f"\n{'kernel':34}{'PyTorch us':>11}{'ours us':>9}{'of band':>9}")

    def row(name: str, torch_way: Callable[[], Any], ours: Callable[[], Any], num_bytes: int, count: int = 20) -> None:
        a, b = seconds([torch_way] * max(1, count // 4)) * 1e6, seconds([ours] * count) * 1e6
        report["kernels"][name] = {"torch_us": a, "ours_us": b, "bytes": num_bytes}
        print(f"{name:34}{a:11.2f}{b:9.2f}{num_bytes / b * 1e6 / bandwidth:9.0%}")

    hidden, heads, kv_heads, inner = 1024, 16, 8, 3072
    weight, head_weight = random(hidden), random(HEAD_DIM)
    angles = torch.rand(16384, HEAD_DIM // 2, device=DEVICE)
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    for rows in (1, 64, 256, 16384):
        x, residual = random(rows, hidden), random(rows, hidden)
        row(
            f"add + RMSNorm [{rows}, {hidden}]",
            lambda x=x, r=residual: F.rms_norm(x + r, (hidden,), weight, 1e-6),
            lambda x=x, r=residual: add_rms_norm(x, r, weight, 1e-6), 4 * x.nbytes,
        )  # fmt: skip
        gate_up = random(rows, 2 * inner)
        row(
            f"SiLU * mul [{rows}, {2 * inner}]",
            lambda g=gate_up: F.silu(g[:, :inner]) * g[:, inner:],
            lambda g=gate_up: silu_mul(g), gate_up.nbytes * 3 // 2,
        )  # fmt: skip
        qkv, positions = random(rows, (heads + 2 * kv_heads) * HEAD_DIM), torch.arange(rows, device=DEVICE)
        cache = torch.zeros(2, rows // BLOCK_SIZE + 1, BLOCK_SIZE, kv_heads, HEAD_DIM, device=DEVICE, dtype=DTYPE)

        def plain(qkv: torch.Tensor = qkv, at: torch.Tensor = positions, cache: torch.Tensor = cache) -> torch.Tensor:
            q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split([heads, kv_heads, kv_heads], 1)
            q, k = (F.rms_norm(h, (HEAD_DIM,), head_weight, 1e-6) for h in (q, k))
            q, k = (apply_rotary(h, cos[at].unsqueeze(1), sin[at].unsqueeze(1)) for h in (q, k))
            cache[0][at // BLOCK_SIZE, at % BLOCK_SIZE], cache[1][at // BLOCK_SIZE, at % BLOCK_SIZE] = k, v
            return q

        row(
            f"norm, rotate, store [{rows}, {qkv.shape[1]}]", plain,
            lambda q=qkv, p=positions, c=cache: norm_rotate_store(
                Projection(q, head_weight, head_weight, 1e-6, cos, sin, p), p, c[0], c[1]
            ),
            2 * qkv.nbytes,
        )  # fmt: skip
        del x, residual, gate_up, qkv, cache
    for rows in (1, 64, 256):
        logits = random(rows, VOCAB_SIZE) * 3
        whole, numbers = torch.ones(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
        zero = whole * 0
        row(
            f"greedy [{rows}, V]", lambda x=logits: x.argmax(-1),
            lambda x=logits, n=numbers, z=zero: draw(x, z, n, n), logits.nbytes, 8,
        )  # fmt: skip
        column = numbers.unsqueeze(-1)
        row(
            f"temperature [{rows}, V]",
            lambda x=logits, c=column: (x.float() / 0.6 + gumbel_noise(c, c, VOCAB_SIZE)).argmax(-1),
            lambda x=logits, n=numbers, w=whole: draw(x, w * 0.6, n, n), logits.nbytes, 4,
        )  # fmt: skip
        row(
            f"top_k 20, top_p 0.95, min_p 0.01 [{rows}, V]",
            lambda x=logits, w=whole, c=column: keep_likely(
                keep_top(x.float(), c * 0 + 20, w.unsqueeze(-1) * 0.95), w.unsqueeze(-1) * 0.01
            ),
            lambda x=logits, w=whole, n=numbers: thresholds(x, w, n * 0 + 20, w * 0.95, w * 0.01), logits.nbytes, 4,
        )  # fmt: skip
        row(
            f"top_p 0.95 [{rows}, V]",
            lambda x=logits, w=whole, c=column: keep_top(x.float(), c * 0 + VOCAB_SIZE, w.unsqueeze(-1) * 0.95),
            lambda x=logits, w=whole, n=numbers: thresholds(x, w, n * 0 + VOCAB_SIZE, w * 0.95, w * 0),
            logits.nbytes, 4,
        )  # fmt: skip
        del logits
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--rows", nargs="+", type=int, default=list(TUNED_ROWS), help="rows of x to tune for")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for tuning a model")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile settings")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.warm is not None:
        return warm(args.warm, args.workers, args.rows)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": args.rows, "failed": [],
        "tuning": {}, "kernels": {}, "steps": {},
    }  # fmt: skip
    bandwidth = report["read_bandwidth"] = read_bandwidth()
    torch.cuda.empty_cache()
    print(f"{report['device']}, torch {torch.__version__}: reads {bandwidth / 1e12:.2f} TB/s")
    try:
        if args.tune:
            start = time.monotonic()
            command = [sys.executable, __file__, "--workers", str(args.workers), "--rows", *map(str, args.rows)]
            processes = [subprocess.Popen([*command, "--warm", str(i)]) for i in range(args.workers)]
            for process in processes:
                process.wait()
            print(f"\ncompiled in {time.monotonic() - start:.0f} s; ms a step with the best settings of each GEMM")
            settings: Settings = {}
            use(settings)
            for name in args.models:
                tune(name, settings, bandwidth, report, time.monotonic() + args.limit)
        for name in args.models:
            steps(name, bandwidth, report)
        small_kernels(bandwidth, report)
    finally:
        args.out.write_text(json.dumps(report, indent=1))
    return None


def use(settings: Settings) -> None:
    """Let GEMMs take these settings, as long as they last; their own where there is none, or several rows are fused."""
    own = dispatch.find_config

    def find_config(epilogue: Any, num_rows: int, num_outputs: int, size: int) -> GemmConfig | None:
        rows = next((rows for rows in TUNED_ROWS if rows >= num_rows), num_rows)
        key = (num_outputs, size, rows)
        if key not in settings or (rows > 1 and epilogue not in ("plain", "split", "gate")):
            return own(epilogue, num_rows, num_outputs, size)
        return settings[key]

    dispatch.find_config = find_config


if __name__ == "__main__":
    main()
