"""Random ragged batches for attention backends, and the comparison with the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from nanoflow.core.interfaces import AttentionBackend, AttentionContext, NoOptions
from nanoflow.core.layers import apply_rotary
from nanoflow.core.types import AttentionInput, Projection
from nanoflow.plugins.attention.torch_paged import TorchAttention

CPU = torch.device("cpu")
GARBAGE = 3e3  # in slots that hold no token: finite, as the contract says, and ruinous if it is attended to


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
        cls, rng: np.random.Generator, block_size: int, decodes: list[int], chunks: list[tuple[int, int]] = (),
        shared: int = 0, spare: int = 3,
    ) -> Case:  # fmt: skip
        """Decodes with these context lengths, chunks with these (new tokens, tokens before them).

        Blocks are strewn over the cache. Sequences share their first `shared` blocks, as far as all of those are past.
        Tables are wider than need be, filled with valid ids.
        """
        query_lens = np.array([1] * len(decodes) + [new for new, _ in chunks])
        context_lens = np.array(list(decodes) + [new + past for new, past in chunks])
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


def fill(backend: AttentionBackend, c: AttentionContext, case: Case, generator: torch.Generator) -> None:
    """Random keys and values where the batch's contexts lie, garbage everywhere else."""
    shape = (c.num_layers, 2, case.num_blocks * c.block_size, c.num_kv_heads, c.head_dim)
    used = torch.zeros(shape[2], dtype=torch.bool)
    used[torch.from_numpy(case.slots(c.block_size, new_only=False))] = True
    content = torch.randn(shape, generator=generator, dtype=torch.float32)
    content[:, :, ~used] = GARBAGE
    for layer in range(c.num_layers):
        for cache, new in zip(backend.cache(layer), content[layer], strict=True):
            cache.copy_(new.view(cache.shape))


def projections(c: AttentionContext, num_tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as a model has them: parts of one fused projection, so that their rows are strided."""
    sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
    fused = torch.randn((num_tokens, sum(sizes), c.head_dim), generator=generator)
    return fused.to(c.device, c.dtype).split(sizes, dim=1)


def errors(
    build: type[AttentionBackend], config: object, c: AttentionContext, case: Case, seed: int = 0
) -> list[float]:
    """‖out - ref‖ / ‖ref‖ of each layer, against the torch backend in float32 on the same (rounded) numbers."""
    exact = replace(c, dtype=torch.float32)
    backend, reference = build(config, c), TorchAttention(NoOptions(), exact)
    found = []
    for one in (backend, reference):
        one.allocate(case.num_blocks)
        one.plan(case.inputs(c.block_size, c.device))
    fill(backend, c, case, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in range(c.num_layers):
        for mine, theirs in zip(backend.cache(layer), reference.cache(layer), strict=True):
            theirs.copy_(mine)
        query, key, value = projections(c, int(case.query_lens.sum()), generator)
        poison(query)
        out = backend.forward(layer, query, key, value)
        expected = reference.forward(layer, query.float(), key.float(), value.float())
        assert (out.shape, out.dtype) == (query.shape, c.dtype)
        for mine, theirs in zip(backend.cache(layer), reference.cache(layer), strict=True):
            assert torch.equal(mine.float(), theirs), "exactly the new slots were written"
        found.append(float((out.double() - expected.double()).norm() / expected.double().norm()))
    return found


def projected_errors(
    build: type[AttentionBackend], config: object, c: AttentionContext, case: Case, *, normed: bool, seed: int = 0
) -> list[float]:
    """As `errors` of `project_and_attend`, for a batch of decodes; of the new keys in the cache, too."""
    backend, reference = build(config, c), TorchAttention(NoOptions(), replace(c, dtype=torch.float32))
    for one in (backend, reference):
        one.allocate(case.num_blocks)
        one.plan(replace(case.inputs(c.block_size, c.device), settled=True))
    fill(backend, c, case, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    positions = torch.from_numpy(case.context_lens - 1).to(c.device)
    angles = torch.rand(int(case.context_lens.max()), c.head_dim // 2, generator=generator).to(c.device) * 6
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    weights = torch.randn(2, c.head_dim, generator=generator).to(c.device, c.dtype) if normed else (None, None)
    found = []
    for layer in range(c.num_layers):
        for mine, theirs in zip(backend.cache(layer), reference.cache(layer), strict=True):
            theirs.copy_(mine)
        qkv = torch.randn(len(positions), (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 16, generator=generator)
        qkv = qkv.to(c.device, c.dtype)[:, :-16]
        poison(qkv[:, : c.num_heads * c.head_dim].unflatten(-1, (-1, c.head_dim)))
        out = backend.project_and_attend(layer, Projection(qkv, *weights, 1e-6, cos, sin, positions))
        assert out is not None
        q, k, v = qkv.float().unflatten(-1, (-1, c.head_dim)).split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
        if normed:
            q, k = (F.rms_norm(x, (c.head_dim,), w.float(), 1e-6) for x, w in zip((q, k), weights, strict=True))
        q, k = (apply_rotary(x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)) for x in (q, k))
        expected = reference.forward(layer, q, k, v)
        pairs = [(out, expected), *zip(backend.cache(layer), reference.cache(layer), strict=True)]
        found += [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    return found


def poison(like: torch.Tensor) -> None:
    """Leave NaN in memory that the next tensor of this shape is likely to get."""
    torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device)
