"""What a run did and how fast, and how it is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nanoflow.core.data.outputs import RequestOutput

if TYPE_CHECKING:
    from nanoflow.core.api.llm import LLM


@dataclass(frozen=True)
class RunReport:
    """What a job did. The time is that of generating; building the engine is left out.

    Attributes:
        description: checkpoint, the plugin of each role, device and dtype.
        seconds: from the first prompt handed over to the last completion.
        requests: prompts completed.
        prompt_tokens: tokens of all prompts.
        output_tokens: tokens generated.
        ttft: mean time to first token, seconds.
        preemptions: how often a sequence lost its KV blocks.
        queried_tokens: tokens looked up in the prefix cache.
        hit_tokens: how many of them were found.
    """

    columns: ClassVar[dict[str, str]] = {  # of a sweep's table; its CSV file has more
        "output_tokens_per_s": "output tok/s",
        "total_tokens_per_s": "total tok/s",
        "ttft_ms": "TTFT ms",
        "requests": "requests",
        "preemptions": "preemptions",
        "hit_rate_percent": "cache hits %",
    }

    description: dict[str, str]
    seconds: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    ttft: float
    preemptions: int
    queried_tokens: int
    hit_tokens: int

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.seconds

    @property
    def output_rate(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        """The share of tokens looked up in the prefix cache that were found, in percent."""
        return 100 * self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0

    @property
    def headline(self) -> str:
        """The outcome in a few words."""
        return f"{self.output_rate:,.0f} output tok/s, TTFT {1000 * self.ttft:.0f} ms"

    def numbers(self) -> dict[str, int | float]:
        """What can be compared between jobs, by the names that tables and files use."""
        return {
            "output_tokens_per_s": round(self.output_rate, 1),
            "total_tokens_per_s": round(self.prompt_rate + self.output_rate, 1),
            "ttft_ms": round(1000 * self.ttft, 1),
            "seconds": round(self.seconds, 3),
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "preemptions": self.preemptions,
            "hit_rate_percent": round(self.hit_rate, 1),
        }


@dataclass
class Tally:
    """What counts of the results, so that they need not be kept."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttfts: int = 0
    ttft_sum: float = 0.0

    def add(self, result: RequestOutput) -> None:
        """Count a finished request."""
        self.requests += 1
        self.prompt_tokens += len(result.prompt_token_ids)
        self.output_tokens += sum(len(completion.token_ids) for completion in result.outputs)
        if result.metrics.ttft is not None:
            self.ttfts += 1
            self.ttft_sum += result.metrics.ttft

    def report(self, llm: LLM, seconds: float) -> RunReport:
        """What the job did in so many seconds."""
        stats = llm.stats
        return RunReport(
            description=llm.describe(),
            seconds=seconds,
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            ttft=self.ttft_sum / max(self.ttfts, 1),
            preemptions=stats.num_preemptions,
            queried_tokens=stats.num_queried_tokens,
            hit_tokens=stats.num_hit_tokens,
        )
