"""The sum over ranks with the residual addition and RMS norm that follow it, in one kernel over the ranks' memory.

Every rank has an inbox that the others write to. A program has one row: it adds up its rank's own summands, sends the
result to the others, waits for theirs, and goes on as the norm alone would. A word of an inbox is 64 bits, written and
read as a whole: 32 of the row, and the number of the call, by which a reader knows that the word has arrived. So a sum
takes one trip over the link, without a fence or a flag behind the data (as in NCCL's protocol LL).

So every rank sends all rows to all others. With more than two ranks and more than a few rows that takes longer than a
second trip: then each row has an owner, rank row % N, which alone gets the others' parts, and sends them the new
residual, whose norm they work out themselves.

Calls are numbered from 1 on by a counter on the device, since a captured graph gets nothing from the host. All ranks
make the same calls in the same order, so their numbers agree; they begin anew after 2^32. Words of even and of odd
calls have different places, and two are enough. In call n a rank writes over what it wrote in call n - 2. Its call
n - 1 has ended then, so it has got words of call n - 1 from each of the others; those sent them after their call n - 2
had ended, with all words read. It does not matter how long rows are, nor how many a call has (with owners no fewer than
ranks, so that each rank owns one).

Nor can ranks wait for each other in a circle: a program sends its part before it waits, an owner waits for nothing but
parts, and all wait for programs of the same row alone. GPUs start programs in the order of rows, so those with the
first unfinished row run on all ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.launch import begin, overlap


def sum_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, inboxes: torch.Tensor,
    calls: torch.Tensor, left: torch.Tensor, rank: int, most_words: int, *, owned: bool = False,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`add_rms_norm` of the sum of all ranks' `x`, which are rounded to the residual's dtype before they are added up.

    The sum is made in float32 in the order of ranks, and rounded; so all ranks get the same bits.

    Args:
        x: [T, D]; or [C, T, D], C summands of it. T is 1 to R.
        residual: [T, D], of a dtype of 2 or 4 bytes; any row stride. It is overwritten.
        weight: [D]
        eps: added to the mean square.
        inboxes: int64 [N], addresses of the N ranks' inboxes, each int64 [2, N, `most_words`]: by call, and by sender.
            All words are 0 before the first call.
        calls: int32 [R], all of them how many there have been: 0 before the first. R is a power of two.
        left: int32 [1]; anything but 0 ends this and all later calls without the others' words.
        rank: this one.
        most_words: no less than T times D, halved for dtypes of 2 bytes.
        owned: whether rows have owners; then T is at least N.
        num_warps: of a program; None for what suits D.

    Returns:
        The norm [T, D], and x + residual [T, D].
    """
    num_rows, size = residual.shape
    packed = 4 // residual.dtype.itemsize
    assert 0 < num_rows <= len(calls)
    assert size % packed == 0
    assert num_rows * size <= most_words * packed
    assert not owned or num_rows >= len(inboxes)
    out = torch.empty((num_rows, size), dtype=residual.dtype, device=residual.device)
    words = triton.next_power_of_2(size // packed)
    parts = x.shape[0] if x.dim() == 3 else 1
    _sum_add_rms_norm[(num_rows,)](
        x, residual, weight, out, inboxes, calls, left, size, eps, most_words,
        x.stride(-2), x.stride(0) if parts > 1 else 0, residual.stride(0),
        PARTS=parts, WORDS=words, PACKED=packed, RANK=rank, RANKS=len(inboxes), ROWS=len(calls), OWNED=owned,
        num_warps=num_warps or max(8, min(16, words * packed // 512)), **overlap(residual),
    )  # fmt: skip
    return out, residual


@triton.jit
def _sum_add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, inboxes_ptr, calls_ptr, left_ptr, size, eps, most_words,
    x_stride, part_stride, residual_stride,
    PARTS: tl.constexpr, WORDS: tl.constexpr, PACKED: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, OWNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    columns = word[:, None] * PACKED + tl.arange(0, PACKED)[None, :]
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    begin(PDL)
    call = tl.load(calls_ptr + row) + 1
    dtype = residual_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * part_stride + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    own = x.to(dtype)
    words = pack(own, call, PACKED)
    sent = word * PACKED < size
    place = (call & 1).to(tl.int64) * RANKS * most_words + row * (size // PACKED) + word
    owner = row % RANKS
    for rank in tl.static_range(RANKS):
        if rank != RANK:  # noqa: SIM102 (the one is known to the compiler, the other is not)
            if (not OWNED) or owner == rank:
                send(words, sent, inboxes_ptr, rank, RANK * most_words + place)
    # Every counter but this row's is read by no other program of this call. This row's is read by each thread.
    tl.debug_barrier()
    rows = tl.arange(0, ROWS)
    tl.store(calls_ptr + rows, tl.zeros([ROWS], tl.int32) + call, mask=rows % tl.num_programs(0) == row)
    residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    inbox = tl.load(inboxes_ptr + RANK).to(tl.pointer_type(tl.int64))
    if (not OWNED) or owner == RANK:
        total = tl.zeros([WORDS, PACKED], tl.float32)
        for rank in tl.static_range(RANKS):
            if rank == RANK:
                total += own.to(tl.float32)
            else:
                received = receive(inbox + rank * most_words + place, sent, call, left_ptr)
                total += unpack(received, dtype, PACKED).to(tl.float32)
        rounded = (total.to(dtype).to(tl.float32) + residual).to(dtype)
        if OWNED:
            words = pack(rounded, call, PACKED)
            for rank in tl.static_range(RANKS):
                if rank != RANK:
                    send(words, sent, inboxes_ptr, rank, RANK * most_words + place)
    else:
        rounded = unpack(receive(inbox + owner * most_words + place, sent, call, left_ptr), dtype, PACKED)
    tl.store(residual_ptr + row * residual_stride + columns, rounded, mask=inside)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(total * total, 1), 0) / size + eps)
    tl.store(out_ptr + row * size + columns, (total * scale * weight).to(dtype), mask=inside)


@triton.jit
def send(words, sent, inboxes_ptr, rank, places):
    """Words to these places of a rank's inbox."""
    inbox = tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64))
    tl.store(inbox + places, words, mask=sent, cache_modifier=".wt")


@triton.jit
def pack(x, call, PACKED: tl.constexpr):
    """[W, `PACKED`] values of 4 bytes together -> int64 [W], with the call's number (int32) in their upper halves."""
    if PACKED == 1:
        bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
    else:
        bits = x.to(tl.uint16, bitcast=True).to(tl.int64) << (16 * tl.arange(0, 2)[None, :])
    return tl.sum(bits, 1) | (call.to(tl.int64) << 32)


@triton.jit
def unpack(words, dtype: tl.constexpr, PACKED: tl.constexpr):
    """What `pack` packed, [W, `PACKED`]."""
    if PACKED == 1:
        x = words[:, None].to(tl.uint32).to(dtype, bitcast=True)
    else:
        x = (words[:, None] >> (16 * tl.arange(0, 2)[None, :])).to(tl.uint16).to(dtype, bitcast=True)
    return x


@triton.jit
def receive(pointers, sent, call, left_ptr):
    """The words at these places, once all of them are this call's."""
    words = tl.load(pointers, mask=sent, other=0, volatile=True)
    missing = tl.max((sent & ((words >> 32).to(tl.int32) != call)).to(tl.int32), 0)
    while missing > 0:
        words = tl.load(pointers, mask=sent, other=0, volatile=True)
        missing = tl.max((sent & ((words >> 32).to(tl.int32) != call)).to(tl.int32), 0)
        if tl.load(left_ptr, volatile=True) != 0:
            missing = 0
    return words
