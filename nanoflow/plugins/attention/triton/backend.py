"""`attention=triton`: our own kernels, for any GPU that Triton serves."""

from __future__ import annotations

import torch

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput, Projection
from nanoflow.core.kernels.memory import empty_rows
from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.attention.paged import PagedAttention
from nanoflow.plugins.attention.triton.decode import Shares, TritonDecode
from nanoflow.plugins.attention.triton.prefill import TritonPrefill
from nanoflow.plugins.attention.triton.settings import DecodeSettings, decode_settings, prefill_settings
from nanoflow.plugins.attention.triton.store import store


class TritonAttention(PagedAttention):
    """Decode balanced over tokens, prefill over a list of tiles; see the kernels' modules."""

    def __init__(self, config: NoOptions, context: AttentionContext) -> None:
        super().__init__(context)
        self.num_sms, self.shared_memory = limits(context.device)
        self.decoders: dict[DecodeSettings, TritonDecode] = {}  # kept: captured graphs use their buffers
        self.decoder: TritonDecode
        self.prefiller = TritonPrefill(context, prefill_settings(context, self.shared_memory))
        self.shares: dict[int | None, Shares] = {}  # of this step, by a layer's window
        self.tiles: torch.Tensor

    def plan_decode(self, inputs: AttentionInput) -> None:
        settings = decode_settings(self.context, inputs.num_seqs, self.shared_memory)
        if settings not in self.decoders:
            self.decoders[settings] = TritonDecode(self.context, settings, self.num_sms)
        self.decoder = self.decoders[settings]
        self.shares = {window: self.decoder.shares(inputs, window) for window in self.context.distinct_windows}

    def plan_mix(self, inputs: AttentionInput) -> None:
        self.plan_decode(inputs)
        self.tiles = self.prefiller.tiles(inputs, beside_decodes=True)

    def decode(self, layer: int, query_SNH: torch.Tensor) -> torch.Tensor:
        out_SNH = empty_rows(*query_SNH.shape, dtype=query_SNH.dtype, device=query_SNH.device)
        self.decoder(self.shares[self.context.window(layer)], self.inputs, query_SNH, *self.cache(layer), out_SNH)
        return out_SNH

    def mix(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        out_TNH = self.decode(layer, query_TNH)  # writes the rows of leading decodes, and no others
        self.prefiller(
            self.tiles, self.inputs, query_TNH, *self.cache(layer), out_TNH, window=self.context.window(layer)
        )
        return out_TNH

    def project_and_attend(self, layer: int, projection: Projection) -> torch.Tensor | None:
        qkv, c = projection.qkv_TE, self.context
        shares = self.shares[c.window(layer)]
        if shares.skip == 0:
            return None
        out_SNH = empty_rows(len(qkv), c.num_heads, c.head_dim, dtype=qkv.dtype, device=qkv.device)
        self.decoder.project(shares, self.inputs, projection, *self.cache(layer), out_SNH)
        return out_SNH

    def store(self, layer: int, key_TKH: torch.Tensor, value_TKH: torch.Tensor) -> None:
        store(key_TKH, value_TKH, *self.cache(layer), self.slot_mapping_T)


def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    if device.type == "cpu":  # Triton's interpreter: few programs, so that small batches are cut too
        return 8, 2**17
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def why_not(context: AttentionContext, interpreted: bool) -> str | None:
    """Why these kernels can't serve `context`, if so. `interpreted`: Triton runs them in its interpreter, on a CPU."""
    c = context
    if c.device.type != "cuda" and not (interpreted and c.device.type == "cpu"):
        return f"it needs a GPU, and the engine runs on the device {str(c.device)!r}."
    if c.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it serves float16, bfloat16 and float32, not {c.dtype}."
    if c.block_size < 16 or c.block_size & (c.block_size - 1):
        return f"it needs a block size that is a power of two from 16 on, not {c.block_size}."
    if c.head_dim > 256:
        return f"it serves head dims up to 256, not {c.head_dim}."
    if c.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(c.device) < (8, 0):
        return f"it needs an NVIDIA GPU of the Ampere generation or later, not {torch.cuda.get_device_name(c.device)}."
    return None
