"""`attention=flash`: the best FlashAttention that is installed."""

from __future__ import annotations

import torch

from nanoflow.core.interfaces import AttentionContext
from nanoflow.core.types import AttentionInput
from nanoflow.plugins.attention.flash_versions import FlashVersion, Rows, choose
from nanoflow.plugins.attention.options import FlashConfig
from nanoflow.plugins.attention.paged import PagedAttention

# Measured on an H100 with 8 KV heads: contexts cut into enough parts to fill the multiprocessors read twice as fast for
# one sequence as uncut ones, and 1.4 times as fast for 8; from 32 sequences on the number of parts doesn't matter.
PROGRAMS_PER_SM = 2
MAX_SPLITS = 32
QUERIES_PER_TILE = 128  # rows of FlashAttention's tiles, the query heads of a KV head counted


class FlashCalls:
    """Turns parts of a batch into calls of one FlashAttention."""

    def __init__(self, context: AttentionContext, num_splits: int = 0) -> None:
        self.num_splits = num_splits
        version, reason = choose(context)
        assert version is not None, reason
        self.context = context
        self.version: FlashVersion = version(context)
        self.num_sms = torch.cuda.get_device_properties(context.device).multi_processor_count

    def decodes(self, inputs: AttentionInput) -> Rows:
        """The leading sequences. Decides by their number alone, since a captured graph sees other lengths later."""
        num_seqs = inputs.num_decodes
        rows = self._rows(inputs, 0, num_seqs, max_query_len=1)
        rows.num_splits = self.num_splits or decode_splits(num_seqs * self.context.num_kv_heads, self.num_sms)
        return rows

    def chunks(self, inputs: AttentionInput) -> Rows:
        """The other sequences."""
        c, first = self.context, inputs.num_decodes
        rows = self._rows(inputs, first, len(inputs.query_lens), int(inputs.query_lens[first:].max()))
        group = c.num_heads // c.num_kv_heads
        num_tiles = (-(-inputs.query_lens[first:] * group // QUERIES_PER_TILE)).sum() * c.num_kv_heads
        rows.num_splits = 1 if num_tiles >= self.num_sms // 2 else 0
        return rows

    def __call__(
        self, rows: Rows, layer: int, query_TNH: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor,
        out_TNH: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        if layer == 0:
            self.version.prepare(rows)
        result = self.version(rows, query_TNH, key_BPKH, value_BPKH)
        return result if out_TNH is None else out_TNH.copy_(result)

    def _rows(self, inputs: AttentionInput, first: int, last: int, max_query_len: int) -> Rows:
        return Rows(
            query_start_S1=inputs.query_start_S1[first : last + 1] - first,  # one query a sequence comes before
            context_lens_S=inputs.context_lens_S[first:last],
            block_tables_SB=inputs.block_tables_SB[first:last],
            max_query_len=max_query_len,
            max_context_len=inputs.block_tables_SB.shape[1] * self.context.block_size,
            num_splits=0,
        )


class FlashAttention(PagedAttention):
    """FlashAttention for decoding sequences and for chunks."""

    def __init__(self, config: FlashConfig, context: AttentionContext) -> None:
        super().__init__(context)
        self.flash = FlashCalls(context, config.num_splits)
        self.decodes: Rows
        self.chunks: Rows

    def plan_decode(self, inputs: AttentionInput) -> None:
        self.decodes = self.flash.decodes(inputs)

    def plan_prefill(self, inputs: AttentionInput) -> None:
        self.chunks = self.flash.chunks(inputs)

    def decode(self, layer: int, query_SNH: torch.Tensor, out_SNH: torch.Tensor | None = None) -> torch.Tensor:
        return self.flash(self.decodes, layer, query_SNH, *self.cache(layer), out_SNH)

    def prefill(self, layer: int, query_TNH: torch.Tensor, out_TNH: torch.Tensor | None = None) -> torch.Tensor:
        return self.flash(self.chunks, layer, query_TNH, *self.cache(layer), out_TNH)


def decode_splits(num_tiles: int, num_sms: int) -> int:
    """Parts of each context, for `num_tiles` pairs of a sequence and a KV head."""
    return min(MAX_SPLITS, max(1, PROGRAMS_PER_SM * num_sms // num_tiles))
