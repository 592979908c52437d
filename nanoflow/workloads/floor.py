"""The least time that a workload can take on a device: bytes that must be read, operations that must be done.

It counts weights, keys and values, and products, each at the speed that the device showed in the same run; nothing for
activations, norms, sampling, launches or the host. Decode attention reads the keys and values of every context at every
step. Linear layers and head are read once a step, and there are no fewer steps than the longest output has tokens.
Prefill is the products of all prompt tokens, with one reading of the weights.

Of a mixture of experts a token computes with those it chose, and a step reads those that its tokens chose: as many as
they hit on average if all are equally likely, as they are with random weights.
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
    """Sizes of a decoder with grouped-query attention and gated feed-forward layers, dense or of experts.

    Attributes:
        linear: elements in the linear layers of all blocks, experts apart.
        head: elements in the output projection.
        query: elements of the queries of a token, over all layers.
        kv: elements of the keys and values of a token, over all layers.
        element: bytes of one.
        expert: elements of one expert, over all layers with experts.
        num_experts: in such a layer.
        num_chosen: how many of them a token takes.
    """

    linear: int
    head: int
    query: int
    kv: int
    element: int
    expert: int = 0
    num_experts: int = 0
    num_chosen: int = 0

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any], element: int) -> Dims | None:
        """The sizes by a checkpoint's config.json; None for a model of another kind."""
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        hidden, layers, heads, inner, vocab_size = (hf_config.get(key) for key in keys)
        num_experts = hf_config.get("num_local_experts") or hf_config.get("num_experts") or 0
        num_chosen, expert_inner = hf_config.get("num_experts_per_tok"), hf_config.get("moe_intermediate_size")
        if not (hidden and layers and heads and inner and vocab_size):
            return None
        if num_experts and not (num_chosen and expert_inner):
            return None
        if hf_config.get("sliding_window") and hf_config.get("use_sliding_window", True):
            return None  # whose attention reads less
        kv_heads = hf_config.get("num_key_value_heads") or heads
        head_dim = hf_config.get("head_dim") or hidden // heads
        attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
        dense_only, step = hf_config.get("mlp_only_layers") or (), hf_config.get("decoder_sparse_step") or 1
        sparse = sum(i not in dense_only and (i + 1) % step == 0 for i in range(layers)) if num_experts else 0
        dense = (layers - sparse) * 3 * hidden * inner
        return cls(
            linear=layers * attention + dense + sparse * hidden * num_experts,
            head=hidden * vocab_size,
            query=layers * heads * head_dim,
            kv=layers * 2 * kv_heads * head_dim,
            element=element,
            expert=sparse * 3 * hidden * expert_inner if sparse else 0,
            num_experts=num_experts if sparse else 0,
            num_chosen=num_chosen if sparse else 0,
        )

    @property
    def active(self) -> int:
        """Elements that a token is multiplied with."""
        return self.linear + self.num_chosen * self.expert

    def read(self, num_tokens: int) -> float:
        """Elements of the linear layers that a step with so many tokens reads."""
        if num_tokens == 0 or not self.num_experts:
            return self.linear
        missed = (1 - self.num_chosen / self.num_experts) ** num_tokens
        return self.linear + self.num_experts * (1 - missed) * self.expert

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
        "linear": Work(
            _decodes_read(dims, num_decodes, steps, max_num_seqs) * dims.element, 2 * num_decodes * dims.active
        ),
        "head": Work((steps + 1) * dims.head * dims.element, 2 * (num_decodes + len(lengths)) * dims.head),
        "prefill": Work(
            dims.read(prompt_tokens) * dims.element, 2 * prompt_tokens * dims.active + 4 * causal * dims.query
        ),
    }


def _decodes_read(dims: Dims, num_decodes: int, steps: int, max_num_seqs: int) -> float:
    """Elements that so many decodes read in so many steps: the fewest where some are full and others have one."""
    full, rest = divmod(num_decodes - steps, max(1, max_num_seqs - 1))
    if full == steps:
        return steps * dims.read(max_num_seqs)
    return full * dims.read(max_num_seqs) + dims.read(1 + rest) + (steps - full - 1) * dims.read(1)


def decode_step(dims: Dims, batch_size: int, input_len: int, output_len: int) -> dict[str, Work]:
    """The work of a decode step, on average over outputs of that length, by part."""
    whole = work(dims, [(input_len, output_len)] * batch_size, batch_size)
    first = work(dims, [(input_len, 1)] * batch_size, batch_size)
    return {part: (whole[part] - first[part]) / (output_len - 1) for part in whole}
