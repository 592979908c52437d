"""The least time that a workload can take on a device: bytes that must be read, operations that must be done.

It counts weights, keys and values, and products, each at the speed that the device showed in the same run; nothing for
activations, norms, sampling, launches or the host. Decode attention reads the keys and values of every context at every
step. Linear layers and head are read once a step, and there are no fewer steps than the longest output has tokens.
Prefill is the products of all prompt tokens, with one reading of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Speed:
    """What a device does at best.

    Attributes:
        bandwidth: bytes read a second.
        flops: floating-point operations a second, in the engine's dtype.
    """

    bandwidth: float
    flops: float

    def times(self, count: int) -> Speed:
        """What so many of the device do."""
        return Speed(count * self.bandwidth, count * self.flops)


@dataclass(frozen=True)
class Work:
    """Bytes read and floating-point operations done; the two overlap."""

    bytes: float = 0.0
    flops: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """The least time for it."""
        return max(self.bytes / speed.bandwidth, self.flops / speed.flops)

    def __sub__(self, other: Work) -> Work:
        return Work(self.bytes - other.bytes, self.flops - other.flops)

    def __truediv__(self, count: float) -> Work:
        return Work(self.bytes / count, self.flops / count)


@dataclass(frozen=True)
class Dims:
    """Sizes of a dense decoder with grouped-query attention and a gated feed-forward layer, such as Qwen3.

    Attributes:
        linear: elements in the linear layers of all blocks.
        head: elements in the output projection.
        query: elements of the queries of a token, over all layers.
        kv: elements of the keys and values of a token, over all layers.
        element: bytes of one.
    """

    linear: int
    head: int
    query: int
    kv: int
    element: int

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any], element: int) -> Dims | None:
        """The sizes by a checkpoint's config.json; None for a model of another kind."""
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        hidden, layers, heads, inner, vocab_size = (hf_config.get(key) for key in keys)
        if not (hidden and layers and heads and inner and vocab_size) or hf_config.get("num_experts"):
            return None
        kv_heads = hf_config.get("num_key_value_heads") or heads
        head_dim = hf_config.get("head_dim") or hidden // heads
        attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
        return cls(
            linear=layers * (attention + 3 * hidden * inner),
            head=hidden * vocab_size,
            query=layers * heads * head_dim,
            kv=layers * 2 * kv_heads * head_dim,
            element=element,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return self.kv * self.element


def work(dims: Dims, lengths: list[tuple[int, int]], max_num_seqs: int) -> dict[str, Work]:
    """The work of requests that all arrive at once, by part.

    Args:
        dims: the model's.
        lengths: tokens of prompt and output of each request. The first output token comes from prefill.
        max_num_seqs: most sequences in a batch.
    """
    prompt_tokens = sum(prompt for prompt, _ in lengths)
    decodes = [output - 1 for _, output in lengths]
    num_decodes = sum(decodes)
    steps = max(max(decodes), -(-num_decodes // max_num_seqs))
    contexts = sum(
        count * prompt + count * (count + 1) // 2 for (prompt, _), count in zip(lengths, decodes, strict=True)
    )
    causal = sum(prompt * (prompt + 1) // 2 for prompt, _ in lengths)
    return {
        "attention": Work(contexts * dims.kv_bytes_per_token, 4 * contexts * dims.query),
        "linear": Work(steps * dims.linear * dims.element, 2 * num_decodes * dims.linear),
        "head": Work((steps + 1) * dims.head * dims.element, 2 * (num_decodes + len(lengths)) * dims.head),
        "prefill": Work(dims.linear * dims.element, 2 * prompt_tokens * dims.linear + 4 * causal * dims.query),
    }


def decode_step(dims: Dims, batch_size: int, input_len: int, output_len: int) -> dict[str, Work]:
    """The work of a decode step, on average over outputs of that length, by part."""
    whole = work(dims, [(input_len, output_len)] * batch_size, batch_size)
    first = work(dims, [(input_len, 1)] * batch_size, batch_size)
    return {part: (whole[part] - first[part]) / (output_len - 1) for part in whole}
