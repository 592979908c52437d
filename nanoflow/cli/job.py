"""One job: build an engine, complete the prompts, and tell what it did and how fast."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanoflow.cli import prompts
from nanoflow.cli.settings import RunConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.registry import Registry
from nanoflow.core.types import RequestOutput

if TYPE_CHECKING:
    from nanoflow.core.llm import LLM


@dataclass(frozen=True)
class Report:
    """What a job did. The time is that of generating; building the engine is left out.

    Attributes:
        made_of: checkpoint, the plugin of each role, device and dtype.
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

    made_of: dict[str, str]
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


def run(config: RunConfig, registry: Registry, *, folder: Path, use_tqdm: bool) -> tuple[list[RequestOutput], Report]:
    """Complete the prompts of `config`, and write `config.output`, if set, under `folder`.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    texts, params = prompts.read(config)
    output = output_file("output", config.output, folder)
    from nanoflow.core.llm import LLM  # takes seconds: what can be checked without it has been by now

    with LLM.from_config(config.build, registry) as llm:
        start = time.perf_counter()
        results = llm.generate(texts, params, use_tqdm=use_tqdm)
        report = _report(llm, results, time.perf_counter() - start)
    if output:
        _write(output, results)
    return results, report


def output_file(key: str, name: str | None, folder: Path) -> Path | None:
    """Where the setting `key`, a file's name under `folder`, lets its file be written; None if it is not set.

    Raises:
        ConfigError: no file can be written there.
    """
    path = folder / Path(name).expanduser() if name else None
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{key} {path} can't be written: it must be a file in a folder that exists.")
    return path


def _report(llm: LLM, results: list[RequestOutput], seconds: float) -> Report:
    stats = llm.stats
    first_tokens = [result.metrics.ttft for result in results if result.metrics.ttft is not None]
    return Report(
        made_of=llm.describe(),
        seconds=seconds,
        requests=len(results),
        prompt_tokens=sum(len(result.prompt_token_ids) for result in results),
        output_tokens=sum(len(result["token_ids"]) for result in results),
        ttft=sum(first_tokens) / max(len(first_tokens), 1),
        preemptions=stats.num_preemptions,
        queried_tokens=stats.num_queried_tokens,
        hit_tokens=stats.num_hit_tokens,
    )


def _write(path: Path, results: list[RequestOutput]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            for result in results:
                file.write(json.dumps(_record(result), ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"output {path} can't be written: {error.strerror}.") from error


def _record(result: RequestOutput) -> dict[str, Any]:
    completion = result.outputs[0]
    return {
        "prompt": result.prompt,
        "prompt_token_ids": result.prompt_token_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
        "num_cached_tokens": result.num_cached_tokens,
        "ttft": result.metrics.ttft,
    }
