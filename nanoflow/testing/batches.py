"""Random ragged batches for attention backends, and attention written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput

CPU = torch.device("cpu")
# (context, layer, positions of queries [Q], positions of keys [L]) -> which keys each query sees, bool [Q, L]
Mask = Callable[[AttentionContext, int, torch.Tensor, torch.Tensor], torch.Tensor]
GARBAGE = torch.nan  # of others, which nobody must see: a weight of 0 does not silence it


def context(
    group: int, head_dim: int, block_size: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU,
    num_kv_heads: int = 2, num_layers: int = 2, windows: tuple[int | None, ...] = (),
) -> AttentionContext:  # fmt: skip
    """Attention shapes with `group` query heads a KV head."""
    return AttentionContext(
        num_layers=num_layers, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        scale=head_dim**-0.5, block_size=block_size, dtype=dtype, device=device, windows=windows,
    )  # fmt: skip


@dataclass
class Case:
    """A batch: what is new in each sequence, its context with that, and where it lies. Decodes come first."""

    query_lens: np.ndarray
    context_lens: np.ndarray
    tables_SB: np.ndarray
    num_blocks: int

    @classmethod
    def draw(
        cls, rng: np.random.Generator, block_size: int, decodes: Sequence[int],
        chunks: Sequence[tuple[int, int]] = (), *, shared: int = 0, spare: int = 3,
    ) -> Case:  # fmt: skip
        """Decodes with these context lengths, chunks with these (new tokens, tokens before them).

        Blocks are strewn over the cache. Sequences share their first `shared` blocks, as far as all of those are past.
        Tables are wider than need be, filled with valid ids.
        """
        query_lens = np.array([1] * len(decodes) + [new for new, _ in chunks], np.int64)
        context_lens = np.array([*decodes, *(new + past for new, past in chunks)], np.int64)
        needed = -(-context_lens // block_size)
        num_blocks = int(needed.sum()) + spare
        free = list(rng.permutation(num_blocks))
        tables_SB = rng.integers(0, num_blocks, (len(needed), int(needed.max()) + 2)).astype(np.int32)
        for row, count in enumerate(needed):
            tables_SB[row, :count] = [free.pop() for _ in range(count)]
            full = min(shared, (context_lens[row] - query_lens[row]) // block_size)
            full = min(full, (context_lens[0] - query_lens[0]) // block_size)
            tables_SB[row, :full] = tables_SB[0, :full]
        return cls(query_lens, context_lens, tables_SB, num_blocks)

    @property
    def num_decodes(self) -> int:
        return next((i for i, new in enumerate(self.query_lens) if new > 1), len(self.query_lens))

    def slots(self, block_size: int, new_only: bool) -> np.ndarray:
        """Slots of the batch's tokens, or of all tokens in its contexts."""
        return np.concatenate(
            [
                self.tables_SB[row, places // block_size].astype(np.int64) * block_size + places % block_size
                for row, (new, length) in enumerate(zip(self.query_lens, self.context_lens, strict=True))
                for places in [np.arange(length - new if new_only else 0, length)]
            ]
        )

    def inputs(self, block_size: int, device: torch.device = CPU) -> AttentionInput:
        return AttentionInput(
            slot_mapping_T=torch.from_numpy(self.slots(block_size, new_only=True)).to(device),
            query_start_S1=torch.tensor([0, *np.cumsum(self.query_lens)], dtype=torch.int32, device=device),
            context_lens_S=torch.from_numpy(self.context_lens.astype(np.int32)).to(device),
            block_tables_SB=torch.from_numpy(self.tables_SB).to(device),
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            num_decodes=self.num_decodes,
        )


def fill(
    backend: AttentionBackend, c: AttentionContext, case: Case, generator: torch.Generator, garbage: float = GARBAGE
) -> None:
    """Random keys and values where the batch's contexts lie, garbage everywhere else."""
    shape = (c.num_layers, 2, case.num_blocks * c.block_size, c.num_kv_heads, c.head_dim)
    used = torch.zeros(shape[2], dtype=torch.bool)
    used[torch.from_numpy(case.slots(c.block_size, new_only=False))] = True
    content = torch.randn(shape, generator=generator, dtype=torch.float32)
    content[:, :, ~used] = garbage
    for layer in range(c.num_layers):
        for cache, new in zip(backend.cache(layer), content[layer], strict=True):
            cache.copy_(new.view(cache.shape))


def projections(c: AttentionContext, num_tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as a model has them: parts of one fused projection, so that their rows are strided."""
    sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
    fused = torch.randn((num_tokens, sum(sizes), c.head_dim), generator=generator)
    return fused.to(c.device, c.dtype).split(sizes, dim=1)


def poison(like: torch.Tensor) -> None:
    """Leave NaN in memory that the next tensor of this shape is likely to get."""
    torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device)


def causal_mask(
    c: AttentionContext, layer: int, query_positions_Q: torch.Tensor, key_positions_L: torch.Tensor
) -> torch.Tensor:
    """A query sees the keys up to its own position, within the layer's window if it has one. bool [Q, L]"""
    last_Q1 = query_positions_Q.unsqueeze(1)
    seen_QL = key_positions_L <= last_Q1
    window = c.window(layer)
    return seen_QL if window is None else seen_QL & (key_positions_L > last_Q1 - window)


def written_out(
    c: AttentionContext, layer: int, inputs: AttentionInput, query_TNH: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor], mask: Mask = causal_mask,
) -> torch.Tensor:  # fmt: skip
    """The layer's attention [T, N, H] in float64, one sequence at a time, over keys and values [B, P, K, H]."""
    outputs, first = [], 0
    repeat = c.num_heads // c.num_kv_heads
    for row, (new, length) in enumerate(zip(inputs.query_lens.tolist(), inputs.context_lens.tolist(), strict=True)):
        blocks = inputs.block_tables_SB[row, : -(-length // c.block_size)].long()
        key_NLH, value_NLH = (
            x[blocks].flatten(0, 1)[:length].double().repeat_interleave(repeat, 1).transpose(0, 1) for x in cache
        )
        query_NQH = query_TNH[first : first + new].double().transpose(0, 1)
        scores_NQL = query_NQH @ key_NLH.mT * c.scale
        positions_L = torch.arange(length, device=scores_NQL.device)
        seen_QL = mask(c, layer, positions_L[length - new :], positions_L)
        weights_NQL = scores_NQL.masked_fill(~seen_QL, -torch.inf).softmax(-1)
        outputs.append((weights_NQL @ value_NLH).transpose(0, 1))
        first += new
    return torch.cat(outputs)


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖mine - theirs‖ / ‖theirs‖; NaN where either holds one."""
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())
