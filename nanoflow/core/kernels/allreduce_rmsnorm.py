"""The sum over ranks with the residual addition and RMS norm that follow it, in one kernel over the ranks' memory.

Every rank has an inbox that the others write to. A program has one row: it adds up its rank's own partials, sends the
result to the others, waits for theirs, and goes on as the norm alone would. Inboxes are empty in between: all of their
words, of 32 bits, are `EMPTY`, which no sender writes. So a reader knows of each word by itself whether it has arrived,
a sum takes one trip over the link without a fence or a flag behind the data, and whoever has read a word empties it
(after the Lamport queues in TensorRT-LLM's all-reduce).

So every rank sends all rows to all others. With more than two ranks and more than a few rows that takes longer than a
second trip: then each row has an owner, rank row % N, which alone gets the others' parts, and sends them the new
residual, whose norm they work out themselves.

A counter on the device numbers the calls, since a captured graph gets nothing from the host. All ranks make the same
calls in the same order. Words of even and of odd calls have different places, and two are enough. In call n a rank
writes where it wrote in call n - 2. Its call n - 1 has ended then, so it has got words of call n - 1 from each of the
others; those sent them after their call n - 2 had ended, with all words read and emptied. It does not matter how long
rows are, nor how many a call has (with owners no fewer than ranks, so that each rank owns one).

Nor can ranks wait for each other in a circle: a program sends its part before it waits, an owner waits for nothing but
parts, and all wait for programs of the same row alone. GPUs start programs in the order of rows, so those with the
first unfinished row run on all ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.pdl import pdl_launch_then_wait, pdl_options
from nanoflow.core.ops import allreduce

EMPTY = tl.constexpr(allreduce.EMPTY)
OTHER_NAN = tl.constexpr(0x7FFF7FFF)  # what stands for it elsewhere


def allreduce_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, inboxes: torch.Tensor,
    calls: torch.Tensor, left: torch.Tensor, rank: int, most_words: int, *, owned: bool = False,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `core.ops.allreduce.allreduce_add_rms_norm`.

    Args:
        num_warps: of a program; None for what suits D.
    """
    num_rows, size = residual.shape
    packed = 4 // residual.dtype.itemsize
    parts = x.shape[0] if x.dim() == 3 else 1
    part_stride = x.stride(0) if parts > 1 else 0
    assert 0 < num_rows <= len(calls)
    assert not any(length % packed for length in (size, x.stride(-2), part_stride, residual.stride(0)))
    assert num_rows * size <= most_words * packed
    assert not owned or num_rows >= len(inboxes)
    out = torch.empty((num_rows, size), dtype=residual.dtype, device=residual.device)
    words = triton.next_power_of_2(size // packed)
    _allreduce_add_rms_norm[(num_rows,)](
        x, residual, weight, out, inboxes, calls, left, rank, size, eps, most_words,
        x.stride(-2), part_stride, residual.stride(0),
        PARTS=parts, WORDS=words, PACKED=packed, RANKS=len(inboxes), SENDERS=triton.next_power_of_2(len(inboxes)),
        ROWS=len(calls), OWNED=owned, num_warps=num_warps or max(4, min(16, words // 256)),
        **pdl_options(residual),
    )  # fmt: skip
    return out, residual


@triton.jit(do_not_specialize=["rank"])  # one program for all ranks, which so round alike
def _allreduce_add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, inboxes_ptr, calls_ptr, left_ptr, rank, size, eps, most_words,
    x_stride, part_stride, residual_stride,
    PARTS: tl.constexpr, WORDS: tl.constexpr, PACKED: tl.constexpr, RANKS: tl.constexpr, SENDERS: tl.constexpr,
    ROWS: tl.constexpr, OWNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    inside = word < size // PACKED
    dtype = residual_ptr.dtype.element_ty
    weight, weight_2 = load(weight_ptr, word, inside, PACKED)
    other = tl.arange(0, SENDERS)
    is_other = (other != rank) & (other < RANKS)
    inbox = tl.multiple_of(tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int32)), 16)
    inboxes = tl.load(inboxes_ptr + other, mask=is_other, other=0).to(tl.pointer_type(tl.int32))
    inboxes = tl.multiple_of(inboxes, 16)
    pdl_launch_then_wait(PDL)
    call = tl.load(calls_ptr + row)
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    x, x_2 = load(x_ptr, word, inside, PACKED)
    for part in tl.static_range(1, PARTS):
        more, more_2 = load(x_ptr + part * part_stride, word, inside, PACKED)
        x += more
        x_2 += more_2
    own = pack(x, x_2, dtype, PACKED)
    first = (call & 1).to(tl.int64) * RANKS * most_words + row * (size // PACKED)  # word of this row, in an inbox
    places = inboxes[:, None] + (rank * most_words + first + word)[None, :]
    owner = (row % RANKS).to(tl.int32)
    send(own, places, (is_other & ((not OWNED) | (other == owner)))[:, None] & inside[None, :])
    residual, residual_2 = load(residual_ptr, word, inside, PACKED)
    if (not OWNED) | (owner == rank):
        received = inbox + first + other[:, None] * most_words + word[None, :]
        parts = receive(received, is_other[:, None] & inside[None, :], left_ptr)
        parts, parts_2 = unpack(tl.where((other == rank)[:, None], own[None, :], parts), dtype, PACKED)
        total, total_2 = unpack(pack(tl.sum(parts, 0), tl.sum(parts_2, 0), dtype, PACKED), dtype, PACKED)
        summed = pack(total + residual, total_2 + residual_2, dtype, PACKED)
        if OWNED:
            send(summed, places, is_other[:, None] & inside[None, :])
    else:
        summed = receive(inbox + first + owner * most_words + word, inside, left_ptr)
    tl.store(residual_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + word, summed, mask=inside)
    total, total_2 = unpack(summed, dtype, PACKED)
    scale = tl.rsqrt(tl.sum(total * total + total_2 * total_2, 0) / size + eps)
    out = pack(total * scale * weight, total_2 * scale * weight_2, dtype, PACKED)
    tl.store((out_ptr + row * size).to(tl.pointer_type(tl.int32), bitcast=True) + word, out, mask=inside)
    # Every counter but this row's is read by no other program of this call. This row's is read by each thread.
    tl.debug_barrier()
    rows = tl.arange(0, ROWS)
    tl.store(calls_ptr + rows, tl.zeros([ROWS], tl.int32) + call + 1, mask=rows % tl.num_programs(0) == row)


@triton.jit
def load(row_ptr, word, inside, PACKED: tl.constexpr):
    """What a row has at these words, in float32: the first value, and the second (0 where words have one)."""
    dtype = row_ptr.dtype.element_ty
    if PACKED == 2 and dtype == tl.float32:
        bits = tl.load(row_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + word, mask=inside, other=0)
        first = bits.to(tl.int32).to(tl.float32, bitcast=True)
        second = (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        bits = tl.load(row_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=inside, other=0)
        first, second = unpack(bits, dtype, PACKED)
    return first, second


@triton.jit
def unpack(words, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The values in words, as `load` gives them."""
    if PACKED == 1:
        first, second = words.to(tl.float32, bitcast=True), tl.zeros(words.shape, tl.float32)
    else:
        bits = words.to(tl.uint32, bitcast=True)
        first = bits.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        second = (bits >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def pack(first, second, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The words of float32 values, rounded. None of them is `EMPTY`."""
    if PACKED == 1:
        words = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = second.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        words = (low | (high << 16)).to(tl.int32, bitcast=True)
    return tl.where(words == EMPTY, OTHER_NAN, words)


@triton.jit
def send(words, places, wanted):
    """[W] words to all wanted ones of the places [N, W], where each of them arrives as a whole."""
    tl.store(places, tl.broadcast_to(words[None, :], places.shape), mask=wanted, cache_modifier=".wt")


@triton.jit
def receive(places, expected, left_ptr):
    """The words that are expected at these places, once all of them have arrived; the places are emptied."""
    words = tl.load(places, mask=expected, other=0, volatile=True)
    missing = tl.max((words == EMPTY).to(tl.int32))
    while missing > 0:
        words = tl.load(places, mask=expected, other=0, volatile=True)
        missing = tl.max((words == EMPTY).to(tl.int32))
        if tl.load(left_ptr, volatile=True) != 0:
            missing = 0
    tl.store(places, tl.full(words.shape, EMPTY, tl.int32), mask=expected)
    return words
