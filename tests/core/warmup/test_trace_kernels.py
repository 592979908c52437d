"""Learning which kernels a start launches, and compiling them, without a GPU, which Triton would keep in mind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from nanoflow.core.config.engine_config import Config, EngineConfig, PluginChoice
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.execution import build_runner, plan
from nanoflow.core.kernels.gemm.settings import TmaConfig
from nanoflow.core.kernels.gemm.silu_mul import silu_mul
from nanoflow.core.kernels.gemm.tma import tma_gemm
from nanoflow.core.kernels.norm import add_rms_norm
from nanoflow.core.registry.registry import Registry
from nanoflow.core.warmup.fake_cuda import GPU, Kernel, fake_cuda
from nanoflow.core.warmup.trace_kernels import start_compiling, trace_kernels
from nanoflow.plugins.attention import options
from nanoflow.plugins.attention.flash import versions as flash_versions

pytestmark = pytest.mark.own_process
DEVICE = torch.device("cuda", 0)
H100 = GPU(DEVICE, (9, 0), {"name": "H100", "multi_processor_count": 132, "shared_memory_per_block_optin": 227 * 1024})
EVERY_START = {
    "_receive", "_gather_step_inputs", "share_kernel", "_embedding", "decode_kernel", "_gemv", "_tiled_gemm",
    "_add_rms_norm", "_norm_rotate_store", "_best_of_chunk", "_best_of_row", "_thresholds", "_adjust",
}  # fmt: skip


@pytest.fixture(autouse=True)
def driver_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "no_gpu", lambda: None)
    monkeypatch.setattr(plan, "pick_device", lambda name: DEVICE)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, bool]]]:
    """An empty cache, and what was looked for in it: names of kernels, and whether they were there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found: list[tuple[str, bool]] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found.append((src.name, cache_hit))

    with knobs.compilation.scope():
        knobs.compilation.listener = listen
        yield found


def kernels_of(attention: str, checkpoint: str = "bard", num_ranks: int = 1) -> list[Kernel]:
    small = {"max_num_seqs": 40, "max_num_batched_tokens": 64}
    engine = EngineConfig(max_model_len=256)
    plugins = {"attention": PluginChoice(attention), "scheduler": PluginChoice("fcfs", small)}
    config = Config(checkpoint, engine, plugins)
    made = plan.make_plan(config, Registry.load(), RankGroup(ParallelContext(), None))
    return trace_kernels(config, replace(made, dtype=torch.bfloat16), H100, num_ranks)


def names(kernels: list[Kernel]) -> set[str]:
    return {kernel.function.__name__ for kernel in kernels}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_trace_comes_to_its_end(num_ranks: int, capfd: pytest.CaptureFixture[str]) -> None:
    kernels = kernels_of("triton", num_ranks=num_ranks)
    assert capfd.readouterr().err == ""
    of_one = {"_add_rms_norm"}
    norms = of_one if num_ranks == 1 else {"_allreduce_add_rms_norm"}
    assert names(kernels) >= (EVERY_START - of_one) | norms | {"prefill_kernel", "tile_kernel"}
    assert len(set(kernels)) == len(kernels)


def test_a_mixture_of_experts(capfd: pytest.CaptureFixture[str]) -> None:
    kernels = kernels_of("triton", "qwen3-30b-a3b")
    assert capfd.readouterr().err == ""
    assert names(kernels) >= EVERY_START | {"_route", "_sort", "_gate_up", "_down"}


def test_an_end_before_its_time_leaves_what_came_before(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_runner.ModelRunner, "capture", lambda *_: 1 / 0)
    assert "_thresholds" in names(kernels_of("triton"))
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_operators_from_outside(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as FlashAttention's, one of which says what it returns, while another one is for a GPU only."""
    operators = torch.library.Library("fake_flash", "DEF")
    operators.define("plan(int size, Tensor lens) -> Tensor")
    operators.define("attend(Tensor q, Tensor k) -> (Tensor, Tensor)")
    flash = torch.ops.fake_flash
    module = SimpleNamespace(
        get_scheduler_metadata=lambda size, *args, **_: flash.plan(size, args[5]),
        flash_attn_with_kvcache=lambda q, k, v, **_: flash.attend(q, k)[0],
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(flash_versions, "installed", lambda: [flash_versions.FlashAttention3])
    monkeypatch.setattr(options, "flash_missing", lambda: None)
    monkeypatch.setattr("nanoflow.plugins.attention.flash_missing", lambda: None)
    kernels = kernels_of("hybrid")
    assert capfd.readouterr().err == ""
    assert names(kernels) >= EVERY_START
    assert "prefill_kernel" not in names(kernels)


def launch(dtype: torch.dtype, offset: int = 0) -> None:
    gate_up = torch.empty(3 * 64 + offset, dtype=dtype, device=DEVICE)[offset:].view(3, 64)
    silu_mul(gate_up)
    add_rms_norm(None, gate_up, torch.empty(64, dtype=dtype, device=DEVICE), 1e-6)


def launch_with_descriptions(dtype: torch.dtype) -> None:
    """A kernel that takes tensors described for the GPU, instead of pointers."""
    x, weight = (torch.empty(rows, 128, dtype=dtype, device=DEVICE) for rows in (70, 64))
    tma_gemm(x, weight, None, TmaConfig(64, rows=32, columns=64, splits=1, num_warps=4, num_stages=2))


def test_types_and_alignments_make_kernels() -> None:
    with fake_cuda(H100) as kernels:
        launch(torch.float16)
        launch(torch.float16)
        assert len(kernels) == 2
        launch(torch.bfloat16)
        assert len(kernels) == 4
        launch(torch.float16, offset=1)
        assert len(kernels) == 6


def test_a_launch_finds_what_other_processes_compiled(cache: list[tuple[str, bool]]) -> None:
    with fake_cuda(H100) as kernels:
        launch(torch.float16)
        launch_with_descriptions(torch.float16)
    for process in start_compiling(kernels):
        process.join()
        assert process.exitcode == 0
    with fake_cuda(H100):
        knobs.runtime.jit_cache_hook = None  # what is launched is compiled then, as it is for a real GPU
        for dtype in (torch.float16, torch.bfloat16):
            launch(dtype)
            launch_with_descriptions(dtype)
    assert cache == [(name, hit) for hit in (True, False) for name in ("_silu_mul", "_add_rms_norm", "_tma_gemm")]


def test_a_kernel_that_fails_keeps_none_from_being_compiled(cache: list[tuple[str, bool]]) -> None:
    with fake_cuda(H100) as kernels:
        launch(torch.float32)
    for process in start_compiling([Kernel(kernels[0].function, "{}"), *kernels]):
        process.join()
    with fake_cuda(H100):
        knobs.runtime.jit_cache_hook = None
        launch(torch.float32)
    assert [hit for _, hit in cache] == [True, True]
