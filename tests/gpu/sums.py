"""One rank of several that compare the fused sum over ranks with separate kernels. `test_parallel.py` starts them."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanoflow.core.distributed.process_group import OneShotGroup, make_group
from nanoflow.core.kernels.norm import add_rms_norm
from nanoflow.core.kernels.register import select_ops
from tests.core.kernels.checks import close

EPS = 1e-6
MOST_BYTES = 2 * 1024 * 1024
SIZES = [64, 1000, 4096, 5120]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Call(NamedTuple):
    """One sum: this rank's partials [C, T, D] (or [T, D]), and what is the same on all ranks."""

    x: torch.Tensor
    residual_TD: torch.Tensor
    weight_D: torch.Tensor


def work(rank: int, size: int, port: int) -> None:
    """All comparisons, on the GPU of this number; a store for the ranks listens at the port."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    group = make_group(rank, size, store, device, MOST_BYTES // 1024, select_ops(device), is_local=True)
    assert isinstance(group, OneShotGroup)
    with torch.inference_mode():
        for dtype in DTYPES:
            calls = make_calls(rank, dtype, device)
            for call in calls * 3:
                compare(group, call, size)
            compare_in_a_graph(group, calls, size)
    assert not group.fuses_norm(MOST_BYTES // 4096 + 1, 1024, torch.float32)
    torch.cuda.synchronize()
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(size)])  # nobody leaves while others need its memory
    group.close()


def make_calls(rank: int, dtype: torch.dtype, device: torch.device, count: int = 40) -> list[Call]:
    """Shapes and what ranks share are drawn alike by all of them."""
    shapes = random.Random(str(dtype))
    shared = torch.Generator(device).manual_seed(1)
    own = torch.Generator(device).manual_seed(2 + rank)
    calls = []
    for _ in range(count):
        size = shapes.choice(SIZES)
        most = MOST_BYTES // (size * dtype.itemsize)
        rows = shapes.choice([1, 1, 2, 8, min(64, most), most if most <= 1024 else 1024])
        parts = shapes.choice([1, 3])
        x = torch.randn(parts, rows, size, generator=own, device=device)
        residual = torch.randn(rows, size + 16, generator=shared, device=device).to(dtype)[:, :size]
        weight = torch.randn(size, generator=shared, device=device).to(dtype)
        calls.append(Call(x[0].to(dtype) if parts == 1 else x, residual, weight))
    return calls


def fused(group: OneShotGroup, call: Call, factor: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    x = (call.x.float() * factor).to(call.x.dtype)
    return group.allreduce_add_norm(x, call.residual_TD.clone(), call.weight_D, EPS)


def compare(group: OneShotGroup, call: Call, size: int, factor: float = 1.0) -> None:
    check(group, call, size, factor, *fused(group, call, factor))


def check(
    group: OneShotGroup, call: Call, size: int, factor: float, out_TD: torch.Tensor, total_TD: torch.Tensor
) -> None:
    """With two ranks the same roundings happen in separate kernels, and the new residual has the same bits."""
    dtype = call.residual_TD.dtype
    assert group.fuses_norm(*call.residual_TD.shape, dtype)
    x = (call.x.float() * factor).to(call.x.dtype)
    part = x if x.dim() == 2 else sum_of(x).to(dtype)
    expected, expected_total = add_rms_norm(
        group.all_reduce(part.clone()), call.residual_TD.clone(), call.weight_D, EPS
    )
    if size == 2:
        assert torch.equal(total_TD, expected_total)
    close(total_TD, expected_total, dtype)
    close(out_TD, expected, dtype)
    for result in group.all_gather(out_TD).chunk(size, -1):
        assert torch.equal(result, out_TD)


def sum_of(x_CTD: torch.Tensor) -> torch.Tensor:
    """In the kernel's order."""
    total = x_CTD[0].clone()
    for part in x_CTD[1:]:
        total += part
    return total


def compare_in_a_graph(group: OneShotGroup, calls: list[Call], size: int) -> None:
    """Replayed with other values each time, so that words of an earlier call would be wrong ones."""
    device = calls[0].x.device
    factor = torch.ones(1, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        factor.add_(1)
        results = [fused(group, call, factor) for call in calls]
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    delays = random.Random(size + torch.cuda.current_device())  # each rank has its own
    expected = 1
    for replays in [1, 1, 2, 3, 200, 1]:
        for _ in range(replays):
            if delays.random() < 0.2:
                torch.cuda._sleep(delays.randrange(100_000))
            graph.replay()
        expected += replays
        assert factor.item() == expected
        for call, (out_TD, total_TD) in zip(calls, results, strict=True):
            check(group, call, size, float(expected), out_TD, total_TD)
