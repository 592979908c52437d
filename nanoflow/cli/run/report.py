"""How a run is counted, and the report on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanoflow.bench.report import Report
from nanoflow.core.data.outputs import EngineStats, RequestOutput

if TYPE_CHECKING:
    from nanoflow.core.api.llm import LLM

COLUMNS = {  # of a sweep's table; its CSV file has more
    "output_tokens_per_s": "output tok/s",
    "total_tokens_per_s": "total tok/s",
    "ttft_ms": "TTFT ms",
    "requests": "requests",
    "preemptions": "preemptions",
    "hit_rate_percent": "cache hits %",
}


@dataclass
class Tally:
    """What counts of the results, so that they need not be kept."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttfts: int = 0
    ttft_sum: float = 0.0

    def add(self, result: RequestOutput) -> None:
        """Count a finished request."""
        self.requests += 1
        self.failed += any(completion.finish_reason == "error" for completion in result.outputs)
        self.prompt_tokens += len(result.prompt_token_ids)
        self.output_tokens += sum(len(completion.token_ids) for completion in result.outputs)
        if result.metrics.ttft is not None:
            self.ttfts += 1
            self.ttft_sum += result.metrics.ttft

    def report(self, llm: LLM, seconds: float) -> Report:
        """The report on a run that took so many seconds; building the engine is left out of them."""
        prompt_rate, output_rate = self.prompt_tokens / seconds, self.output_tokens / seconds
        ttft, stats = 1000 * self.ttft_sum / max(self.ttfts, 1), llm.stats
        hit_rate = _hit_rate(stats)
        numbers = {
            "output_tokens_per_s": round(output_rate, 1),
            "total_tokens_per_s": round(prompt_rate + output_rate, 1),
            "ttft_ms": round(ttft, 1),
            "seconds": round(seconds, 3),
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "preemptions": stats.num_preemptions,
            "hit_rate_percent": round(hit_rate, 1),
        }
        summary = (
            f"{self.requests} {'prompt' if self.requests == 1 else 'prompts'}, "
            f"{self.prompt_tokens} + {self.output_tokens} tokens in {seconds:.2f} s: "
            f"prompt {prompt_rate:,.0f} tok/s, output {output_rate:,.0f} tok/s, TTFT {ttft:.0f} ms, "
            f"prefix-cache hits {hit_rate:.0f}%, preemptions {stats.num_preemptions}"
        )
        headline = f"{output_rate:,.0f} output tok/s, TTFT {ttft:.0f} ms"
        return Report(llm.describe(), headline, COLUMNS, numbers, shown=[summary])


def _hit_rate(stats: EngineStats) -> float:
    """The share of tokens looked up in the prefix cache that were found, in percent."""
    return 100 * stats.num_hit_tokens / stats.num_queried_tokens if stats.num_queried_tokens else 0.0
