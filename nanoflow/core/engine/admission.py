"""Request checking: from a prompt and sampling parameters to a request that can be served, or a sentence why not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nanoflow.core.config.engine_config import EngineConfig
from nanoflow.core.config.errors import RequestError, shown
from nanoflow.core.config.integers import in_64_bits, nth_seed
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.messages import AddRequest
from nanoflow.core.engine.limits import LIMITED, check_limits
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Admission:
    """Checks requests. It holds nothing that changes, so that it may be used from any thread.

    Attributes:
        tokenizer: None where the checkpoint has none.
        processors: check what is theirs.
        vocab_size: V; token ids must lie below it.
        max_model_len: most tokens in a sequence.
        eos_token_ids: ids that end a request unless it ignores them.
        num_blocks, block_size: of the KV cache.
        default_params: how to sample where a caller says nothing.
        cache_origin: where the size of the KV cache comes from, and how to raise it.
        limits: options that say how much one request may ask for.
    """

    tokenizer: Tokenizer | None
    processors: LogitsProcessors
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    num_blocks: int
    block_size: int
    default_params: SamplingParams
    cache_origin: str = "; raise engine.num_kv_blocks"
    limits: EngineConfig = field(default_factory=EngineConfig)

    def request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> AddRequest:  # fmt: skip
        """The command that queues a request.

        Raises:
            RequestError: it could never be served, with the numbers.
        """
        max_tokens = self.check(prompt_token_ids, params)
        seeds = None if params.seed is None else [nth_seed(params.seed, index) for index in range(params.n)]
        token_ids = list(self._truncated(prompt_token_ids, params))
        return AddRequest(request_id, token_ids, in_64_bits(params), max_tokens, seeds, prompt, output_kind)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """The most tokens that the request may generate.

        Raises:
            RequestError: it could never be served, with the numbers.
        """
        if params.n > 1 or any(getattr(params, field) for field in LIMITED):
            check_limits(params, self.limits, self.vocab_size)
        prompt_token_ids = self._truncated(prompt_token_ids, params)
        length = len(prompt_token_ids)
        if length == 0:
            raise RequestError("The prompt is empty; give at least one token.")
        if length >= self.max_model_len:
            raise RequestError(
                f"The prompt has {length} tokens, but max_model_len is {self.max_model_len}, and at least one is for "
                f"the output; shorten the prompt to {self.max_model_len - 1} tokens."
            )
        self._check_ids((min(prompt_token_ids), max(prompt_token_ids), *(params.stop_token_ids or ())))
        if params.stop and self.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and the checkpoint has none; use stop_token_ids.")
        limit, name = self.max_model_len, "max_model_len"
        if params.max_tokens is None and (cached := self.num_blocks * self.block_size + 1) < limit:
            limit, name = max(cached, length + 1), "the KV cache"
        max_tokens = limit - length if params.max_tokens is None else min(params.max_tokens, limit - length)
        if params.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens must be at most {max_tokens}, which is what {name} ({limit}) leaves "
                f"for the output of a prompt of {length} tokens, got {shown(params.min_tokens)}."
            )
        if self.processors.may_use(params):
            self.processors.check(params)
        # The last token is sampled and never computed, so it needs no place in the cache.
        needed = length + max_tokens - 1
        if -(-needed // self.block_size) > self.num_blocks:
            raise RequestError(
                f"The request needs a KV cache of {needed} tokens (prompt {length}, output up to {max_tokens}), but "
                f"there are {self.num_blocks} blocks of {self.block_size} tokens{self.cache_origin}, or shorten the "
                "request."
            )
        return max_tokens

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end the request, end-of-sequence ids included unless ignored."""
        return frozenset(params.stop_token_ids or ()).union(() if params.ignore_eos else self.eos_token_ids)

    def _truncated(self, prompt_token_ids: list[int], params: SamplingParams) -> list[int]:
        """The part of the prompt that `truncate_prompt_tokens` leaves."""
        length = params.truncate_prompt_tokens
        if length is None:
            return prompt_token_ids
        if length == -1:
            length = max(1, self.max_model_len - (params.max_tokens or 1))
        return prompt_token_ids[-length:]

    def _check_ids(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"Token id {shown(token_id)} is not in the vocabulary; ids go from 0 to {self.vocab_size - 1}."
                )
