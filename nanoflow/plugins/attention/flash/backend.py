"""`attention=flash`: the best FlashAttention that is installed."""

from __future__ import annotations

import torch

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.plugins.attention.flash.versions import FlashVersion, Rows, choose
from nanoflow.plugins.attention.options import FlashConfig
from nanoflow.plugins.attention.paged import PagedAttention

# Measured on an H100 with 8 KV heads: contexts cut into enough parts to fill the multiprocessors read twice as fast for
# one sequence as uncut ones, and 1.4 times as fast for 8; from 32 sequences on the number of parts doesn't matter.
PROGRAMS_PER_SM = 2
MAX_SPLITS = 32


class FlashCalls:
    """Turns parts of a batch into calls of one FlashAttention."""

    def __init__(self, context: AttentionContext, num_splits: int = 0) -> None:
        self.num_splits = num_splits
        version, reason = choose(context)
        assert version is not None, reason
        self.context = context
        self.version: FlashVersion = version(context)
        self.num_sms = torch.cuda.get_device_properties(context.device).multi_processor_count

    def decodes(self, inputs: AttentionInput, window: int | None) -> Rows:
        """All sequences, which have one query each, in layers of that window.

        Decides by their number alone, since a graph sees other lengths.
        """
        num_splits = self.num_splits or splits(inputs.num_seqs * self.context.num_kv_heads, self.num_sms)
        return self._rows(inputs, inputs.query_start_S1, 1, num_splits, window)

    def chunks(self, inputs: AttentionInput, window: int | None, *, beside_decodes: bool) -> Rows:
        """All sequences with any number of queries; perhaps without those of the leading decodes."""
        starts_S1 = inputs.query_start_S1
        if beside_decodes:
            # Decodes have the first tokens, one each. Where all sequences begin after them, they have no queries.
            places = torch.arange(len(starts_S1), dtype=torch.int32, device=starts_S1.device)
            num_decodes = (starts_S1 == places).cumprod(0).sum(dtype=torch.int32) - 1
            starts_S1 = starts_S1.clamp(min=num_decodes)
        # Cutting contexts needs a kernel that combines the parts, which takes 30 microseconds a layer even where there
        # is nothing to combine, and a graph can't know that.
        return self._rows(inputs, starts_S1, int(inputs.query_lens.max()), 1, window)

    def __call__(
        self, rows: Rows, query_TNH: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor
    ) -> torch.Tensor:
        return self.version(rows, query_TNH, key_BPKH, value_BPKH)

    def _rows(
        self, inputs: AttentionInput, starts_S1: torch.Tensor, max_query_len: int, num_splits: int, window: int | None
    ) -> Rows:
        rows = Rows(
            query_start_S1=starts_S1,
            context_lens_S=inputs.context_lens_S,
            block_tables_SB=inputs.block_tables_SB,
            max_query_len=max_query_len,
            max_context_len=inputs.block_tables_SB.shape[1] * self.context.block_size,
            num_splits=num_splits,
            window=window,
        )
        self.version.prepare(rows)
        return rows


class FlashAttention(PagedAttention):
    """FlashAttention for decoding sequences and for chunks."""

    def __init__(self, config: FlashConfig, context: AttentionContext) -> None:
        super().__init__(context)
        self.flash = FlashCalls(context, config.num_splits)
        self.rows: dict[int | None, Rows] = {}  # of this step, by a layer's window

    def plan_decode(self, inputs: AttentionInput) -> None:
        self.rows = {window: self.flash.decodes(inputs, window) for window in self.context.distinct_windows}

    def plan_mix(self, inputs: AttentionInput) -> None:
        self.rows = {
            window: self.flash.chunks(inputs, window, beside_decodes=False) for window in self.context.distinct_windows
        }

    def decode(self, layer: int, query_SNH: torch.Tensor) -> torch.Tensor:
        return self.flash(self.rows[self.context.window(layer)], query_SNH, *self.cache(layer))

    def mix(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        return self.decode(layer, query_TNH)


def splits(num_tiles: int, num_sms: int) -> int:
    """Parts of each context, for `num_tiles` pairs of a sequence and a KV head."""
    return min(MAX_SPLITS, max(1, PROGRAMS_PER_SM * num_sms // num_tiles))
