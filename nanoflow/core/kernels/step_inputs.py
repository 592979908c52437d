"""The start of a step: its arrays, fetched from the host, and what its rows hold, gathered by one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.pdl import pdl_launch, pdl_options, pdl_wait_then_launch

TOKENS = 256  # a program
ENTRIES = 1024  # of a block table at a time
WORDS = 2048  # a program


def receive(inbox: torch.Tensor, turn_1: torch.Tensor, memory: torch.Tensor) -> None:
    """As `core.ops.step_inputs.receive`."""
    words, slots = memory.view(torch.int32), inbox.view(torch.int32)
    _receive[(triton.cdiv(len(words), WORDS),)](
        slots, turn_1, words, len(words), slots.stride(0), SLOTS=len(slots), WORDS=WORDS,
        PDL=pdl_options(words)["PDL"], num_warps=8,  # the first kernel of a graph has none before it to overlap with
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_words", "stride"])
def _receive(
    inbox_ptr, turn_ptr, words_ptr, num_words, stride, SLOTS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr
):
    pdl_launch(PDL)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    slot = tl.load(turn_ptr) & (SLOTS - 1)
    values = tl.load(inbox_ptr + slot * stride + word, mask=word < num_words, volatile=True)
    tl.store(words_ptr + word, values, mask=word < num_words)


def gather_step_inputs(
    token_ids_T: torch.Tensor, last_token_R: torch.Tensor, rows_S: torch.Tensor, context_lens_S: torch.Tensor,
    block_tables_RB: torch.Tensor, temperature_R: torch.Tensor, seed_R: torch.Tensor, block_size: int,
    block_tables_SB: torch.Tensor, turn_1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `core.ops.step_inputs.gather_step_inputs`; of block tables only the entries that the contexts have."""
    num_tokens, num_seqs = len(token_ids_T), len(rows_S)
    ids_T, seed_S = torch.empty_like(token_ids_T), torch.empty_like(rows_S)
    temperature_S = torch.empty(num_seqs, dtype=torch.float32, device=rows_S.device)
    _gather_step_inputs[(num_seqs + triton.cdiv(num_tokens, TOKENS),)](
        token_ids_T, last_token_R, rows_S, context_lens_S, block_tables_RB, temperature_R, seed_R, ids_T,
        block_tables_SB, temperature_S, seed_S, turn_1, num_tokens, num_seqs, block_size, block_tables_RB.stride(0),
        block_tables_SB.stride(0), COUNT=turn_1 is not None, TOKENS=TOKENS, ENTRIES=ENTRIES, **pdl_options(ids_T),
    )  # fmt: skip
    return ids_T, temperature_S, seed_S


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "from_stride", "to_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "context_lens_ptr"],
)
def _gather_step_inputs(
    token_ids_ptr, last_token_ptr, rows_ptr, context_lens_ptr, from_ptr, temperature_ptr, seed_ptr, ids_ptr, to_ptr,
    temperatures_ptr, seeds_ptr, turn_ptr, num_tokens, num_seqs, block_size, from_stride, to_stride,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pdl_wait_then_launch(PDL)
    if COUNT and program == 0:
        tl.store(turn_ptr, tl.load(turn_ptr) + 1)
    if program < num_seqs:
        row = tl.load(rows_ptr + program)
        tl.store(temperatures_ptr + program, tl.load(temperature_ptr + row))
        tl.store(seeds_ptr + program, tl.load(seed_ptr + row))
        num_blocks = tl.cdiv(tl.load(context_lens_ptr + program), block_size)
        for start in range(0, num_blocks, ENTRIES):
            entry = start + tl.arange(0, ENTRIES)
            block = tl.load(from_ptr + row * from_stride + entry, mask=entry < num_blocks)
            tl.store(to_ptr + program.to(tl.int64) * to_stride + entry, block, mask=entry < num_blocks)
    else:
        token = (program - num_seqs) * TOKENS + tl.arange(0, TOKENS)
        token_id = tl.load(token_ids_ptr + token, mask=token < num_tokens, other=0)
        sampled = tl.load(last_token_ptr - 1 - token_id, mask=token_id < 0, other=0)
        tl.store(ids_ptr + token, tl.where(token_id < 0, sampled, token_id), mask=token < num_tokens)
