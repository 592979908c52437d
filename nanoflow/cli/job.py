"""One job: build an engine, complete the prompts, and tell what it did and how fast."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanoflow.cli import batch, prompts, records
from nanoflow.cli.settings import RunConfig
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.registry.registry import Registry

if TYPE_CHECKING:
    from nanoflow.core.api.llm import LLM


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


class Viewer:
    """Is told of what a job brings; this one lets it pass.

    Attributes:
        streams: whether it wants to see the output of a lone prompt while it grows.
    """

    streams = False

    def start(self, total: int | None, num_done: int) -> None:
        """There are `total` prompts, None if nobody knows, the first `num_done` of which are done already."""

    def grows(self, output: RequestOutput) -> None:
        """The output so far of the only prompt, which is not finished."""

    def done(self, result: RequestOutput) -> None:
        """The next prompt's output."""


def run(config: RunConfig, registry: Registry, *, folder: Path, viewer: Viewer, use_tqdm: bool = False) -> Report:
    """Complete the prompts of `config`, and write `config.output`, if set, under `folder`.

    With an output file, prompts are read and completions written one by one, and a file that holds the beginning
    already is continued. Else all prompts are checked before the first is completed.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    path = output_file("output", config.output, folder)
    if path is None:
        texts, params = prompts.read(config)
        viewer.start(len(texts), 0)
        with _building(config, registry) as llm:
            start, tally = time.perf_counter(), Tally()
            if viewer.streams and len(texts) == 1 and params[0].n == 1:
                results = [_watched(llm, texts, params, viewer)]
            else:
                results = llm.generate(texts, params, use_tqdm=use_tqdm)
            seconds = time.perf_counter() - start
            for result in results:
                tally.add(result)
                viewer.done(result)
            return _report(llm, tally, seconds)

    total = prompts.count(config)
    file = records.RecordsFile(path)
    waiting = file.skip_done(prompts.each(config))
    viewer.start(total, file.num_done)
    with _building(config, registry) as llm:
        start, tally = time.perf_counter(), Tally()
        results = batch.completions(llm, waiting, file.num_done)
        first = next(results, None)  # before the file is touched: a run that fails at once leaves it as it was
        with file.append() as lines:
            for result in chain([first] if first else [], results):
                lines.write(records.line(result))
                tally.add(result)
                viewer.done(result)
        return _report(llm, tally, time.perf_counter() - start)


def _building(config: RunConfig, registry: Registry) -> LLM:
    from nanoflow.core.api.llm import LLM  # takes seconds: what can be checked without it has been by now

    return LLM.from_config(config.build, registry)


def _watched(llm: LLM, texts: list[Any], params: list[SamplingParams], viewer: Viewer) -> RequestOutput:
    """The only prompt's output, shown while it grows."""
    for output in llm.stream(texts, [replace(params[0], output_kind=RequestOutputKind.CUMULATIVE)]):
        if output.finished:
            return output
        viewer.grows(output)
    raise AssertionError("a stream ends with a finished output")


def output_file(key: str, name: str | None, folder: Path) -> Path | None:
    """Where the setting `key`, a file's name under `folder`, lets its file be written; None if it is not set.

    Raises:
        ConfigError: no file can be written there.
    """
    path = folder / Path(name).expanduser() if name else None
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{key} {path} can't be written: it must be a file in a folder that exists.")
    return path


def _report(llm: LLM, tally: Tally, seconds: float) -> Report:
    stats = llm.stats
    return Report(
        made_of=llm.describe(),
        seconds=seconds,
        requests=tally.requests,
        prompt_tokens=tally.prompt_tokens,
        output_tokens=tally.output_tokens,
        ttft=tally.ttft_sum / max(tally.ttfts, 1),
        preemptions=stats.num_preemptions,
        queried_tokens=stats.num_queried_tokens,
        hit_tokens=stats.num_hit_tokens,
    )
