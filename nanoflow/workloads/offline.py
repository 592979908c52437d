"""Requests that are handed over at once."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.workloads.options import LatencyOptions, ThroughputOptions

TOKENS = 10_000  # built-in workloads draw their ids from 0 up to here
SHIFT = 37


@dataclass(frozen=True)
class Workload:
    """Requests that are handed over at once.

    Attributes:
        name: what to call it in results.
        prompts: token ids.
        params: how to sample each.
        vocab_size: V; ids are taken modulo it.
        modulus: each round shifts the ids modulo this.
    """

    name: str
    prompts: list[list[int]]
    params: list[SamplingParams]
    vocab_size: int
    modulus: int = TOKENS

    def round(self, number: int) -> list[list[int]]:
        """The prompts for a round. No two rounds share a prefix, so that the prefix cache helps within one only."""
        shift, modulus, vocab_size = SHIFT * number, self.modulus, self.vocab_size
        return [[(token_id + shift) % modulus % vocab_size for token_id in prompt] for prompt in self.prompts]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of equal requests: how many, and the tokens in each prompt and in each output."""
        return len(self.prompts), len(self.prompts[0]), self.params[0].max_tokens or 1

    def cut(self, max_tokens: int) -> Workload:
        """The same requests with outputs of that many tokens."""
        return replace(self, params=[replace(params, max_tokens=max_tokens) for params in self.params])


def offline256(options: ThroughputOptions, sampling: SamplingParams, vocab_size: int) -> Workload:
    """nano-vLLM's benchmark. With the default sizes it has 142,827 prompt tokens and 133,966 output tokens."""
    draw = random.Random(options.seed).randint
    prompts = [
        [draw(0, TOKENS) for _ in range(draw(options.min_input_len, options.max_input_len))]
        for _ in range(options.num_prompts)
    ]
    lengths = [draw(options.min_output_len, options.max_output_len) for _ in prompts]
    return Workload("offline256", prompts, _of_lengths(sampling, lengths), vocab_size)


def uniform(options: ThroughputOptions, sampling: SamplingParams, vocab_size: int) -> Workload:
    """Prompts and outputs of random lengths, each request drawn apart, so that more of them extend the same list."""
    draw = random.Random(options.seed).randint
    prompts, lengths = [], []
    for _ in range(options.num_prompts):
        lengths.append(draw(options.min_output_len, options.max_output_len))
        prompts.append(random_ids(draw(options.min_input_len, options.max_input_len), draw(0, 2**63)))
    return Workload("random", prompts, _of_lengths(sampling, lengths), vocab_size)


def equal(name: str, sampling: SamplingParams, vocab_size: int, *, count: int, input_len: int, output_len: int,
          seed: int = 0) -> Workload:  # fmt: skip
    """`count` requests of the same lengths."""
    prompts = [random_ids(input_len, f"{seed}/{name}/{index}") for index in range(count)]
    return Workload(name, prompts, _of_lengths(sampling, [output_len] * count), vocab_size)


def decode(batch_size: int, options: LatencyOptions, sampling: SamplingParams, vocab_size: int) -> Workload:
    """As many requests of equal lengths as are to be decoded at a time."""
    return equal(f"decode-{batch_size}", sampling, vocab_size, count=batch_size, input_len=options.input_len,
                 output_len=options.output_len, seed=options.seed)  # fmt: skip


def first_token(input_len: int, options: LatencyOptions, sampling: SamplingParams, vocab_size: int) -> Workload:
    """A prompt of that length, and one token."""
    return equal(f"ttft-{input_len}", sampling, vocab_size, count=1, input_len=input_len, output_len=1,
                 seed=options.seed)  # fmt: skip


def named(name: str, sampling: SamplingParams, vocab_size: int) -> Workload:
    """The one that results call so, at its default sizes: `offline256`, `decode-8` or `ttft-128`."""
    kind, _, number = name.partition("-")
    if kind == "decode":
        return decode(int(number), LatencyOptions(), sampling, vocab_size)
    if kind == "ttft":
        return first_token(int(number), LatencyOptions(), sampling, vocab_size)
    return offline256(ThroughputOptions(), sampling, vocab_size)


def random_ids(length: int, seed: int | str) -> list[int]:
    """That many ids below `TOKENS`."""
    return random.Random(seed).choices(range(TOKENS), k=length)


def _of_lengths(sampling: SamplingParams, lengths: list[int]) -> list[SamplingParams]:
    return [replace(sampling, max_tokens=length) for length in lengths]
