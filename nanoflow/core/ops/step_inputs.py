"""The start of a step: its arrays, fetched from the host, and what its sequences' slots hold."""

from __future__ import annotations

import torch


def receive(inbox: torch.Tensor, turn_1: torch.Tensor, memory: torch.Tensor) -> None:
    """Fetch a captured step's arrays from the buffer whose turn it is.

    Args:
        inbox: uint8 [buffers, bytes]; on the host, pinned where a GPU reads it; as many buffers as a power of two.
        turn_1: int32; how many steps were begun before.
        memory: uint8, at most as long as a buffer, whose first bytes it gets.
    """
    memory.copy_(inbox[int(turn_1) % len(inbox), : len(memory)])


def gather_step_inputs(
    token_ids_T: torch.Tensor, last_token_R: torch.Tensor, rows_S: torch.Tensor, context_lens_S: torch.Tensor,
    block_tables_RB: torch.Tensor, temperature_R: torch.Tensor, seed_R: torch.Tensor, block_size: int,
    block_tables_SB: torch.Tensor, turn_1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """A step's token ids [T], temperatures [S] and seeds [S], by what the slots hold; fills its block tables.

    Args:
        token_ids_T: int64; -1 - r stands for the last token of slot r.
        last_token_R: int64.
        rows_S: int64; the slot of each sequence.
        context_lens_S: int32; tokens of each sequence in the cache at the end of the step.
        block_tables_RB: int32.
        temperature_R: float32.
        seed_R: int64.
        block_size: P.
        block_tables_SB: int32; gets the entries that the contexts have, at least.
        turn_1: int32; raised by one; None for a step that no buffer was fetched for.
    """
    if turn_1 is not None:
        turn_1 += 1
    block_tables_SB.copy_(block_tables_RB[rows_S, : block_tables_SB.shape[1]])
    known_T = token_ids_T >= 0
    sampled_T = last_token_R[torch.where(known_T, 0, -1 - token_ids_T)]
    return torch.where(known_T, token_ids_T, sampled_T), temperature_R[rows_S], seed_R[rows_S]
