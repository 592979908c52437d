"""Log-probabilities of a sequence's tokens, for requests that ask for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.core.data.outputs import Logprob


@dataclass(eq=False, repr=False, slots=True)
class Scored:
    """What `Sequence` keeps of them.

    Attributes:
        num_prompt_tokens: how many of its tokens are the prompt.
        logprobs: for each known output token, log-probabilities by token id; empty unless the request asks for them.
        prompt_logprobs: the same for the tokens of the prompt so far; the first has None, and so have those before
            `prompt_logprobs_start`. None unless asked for.
    """

    num_prompt_tokens: int = field(init=False)
    logprobs: list[dict[int, Logprob]] = field(init=False, default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = field(init=False, default=None)

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be had."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    def add_logprobs(self, position: int, logprobs: list[dict[int, Logprob]]) -> None:
        """Take log-probabilities of the tokens from `position` on, of the prompt or of the output.

        Those of a prompt come again if it was computed again; what is there already stays.
        """
        if position >= self.num_prompt_tokens:
            self.logprobs += logprobs
        elif self.prompt_logprobs is not None:
            self.prompt_logprobs += logprobs[len(self.prompt_logprobs) - position :]
