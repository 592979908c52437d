"""Launching decode attention: its buffers, and how the work of a step is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput, Projection
from nanoflow.core.kernels.pdl import pdl_options
from nanoflow.plugins.attention.triton.decode_kernel import decode_kernel, share_kernel
from nanoflow.plugins.attention.triton.settings import DecodeSettings
from nanoflow.plugins.attention.triton.tiles import LOG2_E


@dataclass(slots=True)
class Shares:
    """How one step's row of tiles is cut: `ends` and `shares` as in `share_kernel`, for one `skip` and one `window`.

    `alone` says that no share has tiles of two sequences.
    """

    ends_S1: torch.Tensor
    shares_W4: torch.Tensor
    skip: int
    alone: bool
    window: int


class TritonDecode:
    """Launches the kernels and owns their buffers.

    Args:
        context: the attention shapes.
        settings: tile size, warps, pipeline stages and programs a multiprocessor for a number of sequences.
        num_sms: multiprocessors of the device.
    """

    def __init__(self, context: AttentionContext, settings: DecodeSettings, num_sms: int) -> None:
        c = self.context = context
        self.settings = settings
        self.num_shares = max(1, round(num_sms * settings.waves / c.num_kv_heads))
        self.group = c.num_heads // c.num_kv_heads
        parts = (c.num_kv_heads, self.num_shares, 2, self.group)
        self.partial = torch.empty((*parts, c.head_dim), dtype=torch.float32, device=c.device)
        self.lse = torch.empty(parts, dtype=torch.float32, device=c.device)
        self.arrived = torch.zeros(parts[:2], dtype=torch.int32, device=c.device)
        block_h, reduce_r = triton.next_power_of_2(c.head_dim), triton.next_power_of_2(self.group)
        self.constants = {
            "R": self.group, "K": c.num_kv_heads, "H": c.head_dim, "P": c.block_size, "BLOCK_R": max(16, reduce_r),
            "BLOCK_H": block_h, "REDUCE_R": reduce_r, "REDUCE_C": max(1, 4096 // (block_h * reduce_r)),
            "PRECISION": "ieee" if c.dtype == torch.float32 else "tf32", "BLOCK_N": settings.block_n,
            "AHEAD": settings.ahead, "num_warps": settings.num_warps, "num_stages": settings.num_stages,
        }  # fmt: skip

    def shares(self, inputs: AttentionInput, window: int | None = None) -> Shares:
        """Cut the work of a step's decoding sequences, in layers of that window.

        This is done on the device, from the lengths that are there when it runs.
        """
        num_seqs, device = inputs.num_seqs, self.context.device
        skip = int(inputs.uniform_decode and self.settings.projects)
        least = self.settings.least if 2 * num_seqs <= self.num_shares else 0  # else there are too few for that
        ends_S1 = torch.empty(num_seqs + 1, dtype=torch.int32, device=device)
        shares_W4 = torch.empty((self.num_shares, 4), dtype=torch.int32, device=device)
        share_kernel[(triton.cdiv(self.num_shares, 8),)](
            inputs.query_start_S1, inputs.context_lens_S, ends_S1, shares_W4, num_seqs, self.num_shares,
            BLOCK_N=self.settings.block_n, BLOCK_S=max(32, triton.next_power_of_2(num_seqs)), BLOCK_W=8,
            LEAST=least, SKIP=skip, WINDOW=window or 0, **pdl_options(ends_S1),
        )  # fmt: skip
        return Shares(ends_S1, shares_W4, skip, least > 0, window or 0)

    def __call__(
        self, shares: Shares, inputs: AttentionInput, query_SNH: torch.Tensor, key_BPKH: torch.Tensor,
        value_BPKH: torch.Tensor, out_SNH: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of the leading sequences that decode, with the work cut as `shares` says."""
        assert shares.skip == 0
        nothing = (None, None, None, None, 0.0)
        self._launch(
            shares, inputs, query_SNH, query_SNH.stride()[:2], nothing, 0, key_BPKH, value_BPKH, out_SNH, False, False
        )

    def project(
        self, shares: Shares, inputs: AttentionInput, projection: Projection, key_BPKH: torch.Tensor,
        value_BPKH: torch.Tensor, out_SNH: torch.Tensor,
    ) -> None:  # fmt: skip
        """The same for queries, keys and values that are yet to be normed, rotated and stored. All sequences decode."""
        assert shares.skip == 1
        p = projection
        self._launch(
            shares, inputs, p.qkv_TE, (p.qkv_TE.stride(0), self.context.head_dim),
            (p.q_weight_H, p.k_weight_H, p.cos_LH, p.sin_LH, p.eps), p.cos_LH.stride(0), key_BPKH, value_BPKH, out_SNH,
            p.q_weight_H is not None, p.k_weight_H is not None,
        )  # fmt: skip

    def _launch(
        self, shares: Shares, inputs: AttentionInput, query: torch.Tensor, query_strides: tuple[int, ...],
        rotation: tuple[Any, ...], table_stride: int, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor,
        out_SNH: torch.Tensor, q_norm: bool, k_norm: bool,
    ) -> None:  # fmt: skip
        decode_kernel[(self.context.num_kv_heads, self.num_shares)](
            out_SNH, query, key_BPKH, value_BPKH, inputs.block_tables_SB, inputs.context_lens_S, shares.ends_S1,
            shares.shares_W4, self.partial, self.lse, self.arrived, *rotation, self.context.scale * LOG2_E,
            inputs.num_seqs, self.num_shares, *out_SNH.stride()[:2], *query_strides, *key_BPKH.stride()[:3],
            *value_BPKH.stride()[:3], inputs.block_tables_SB.stride(0), table_stride, **self.constants,
            SKIP=shares.skip, SINGLE_SEQ=shares.alone, WINDOW=shares.window, Q_NORM=q_norm, K_NORM=k_norm,
            **pdl_options(out_SNH),
        )  # fmt: skip
