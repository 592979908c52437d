"""`nanoflow bench serving`: how long requests wait that arrive over time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanoflow import __version__
from nanoflow.cli import prompts, show
from nanoflow.cli.bench.job import write_record
from nanoflow.cli.bench.report import rounded
from nanoflow.cli.bench.settings import ServingConfig
from nanoflow.cli.hydra_command import HydraCommand
from nanoflow.cli.job import output_file
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.registry.registry import Registry

if TYPE_CHECKING:
    from nanoflow.bench.serving import Served

INTRO = """\
Usage: nanoflow bench serving [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Hands requests over when their time has come, and measures how long each waits: for its first token (TTFT), between the
later ones (TPOT), and for its end (E2E).

  nanoflow bench serving bench.rate=20 bench.output=serving.json
  nanoflow bench serving bench.workload=file prompts_file=in.jsonl bench.rate=2
  nanoflow bench serving bench.step_ms=2      in virtual time: what the scheduler decides, whatever the machine
  nanoflow bench serving -m scheduler=fcfs,priority,sjf,lpm block_manager=plain,prefix,radix    a table of them all
"""


@dataclass(frozen=True)
class ServingReport:
    """What became of the requests.

    Attributes:
        made_of: checkpoint, the plugin of each role, device and dtype.
        seconds: from the start to the last end, on the clock of `bench.step_ms`.
        served: each request, in the order of arrival.
        hit_rate: tokens found in the prefix cache of those looked up, in percent.
    """

    columns: ClassVar[dict[str, str]] = {
        "ttft_p50_ms": "TTFT p50",
        "ttft_p99_ms": "TTFT p99 ms",
        "urgent_ttft_p90_ms": "urgent TTFT p90",
        "tpot_p50_ms": "TPOT p50",
        "tpot_p99_ms": "TPOT p99 ms",
        "e2e_p50_ms": "E2E p50",
        "e2e_p99_ms": "E2E p99 ms",
        "preemptions": "preemptions",
        "hit_rate_percent": "cache hits %",
        "output_tokens_per_s": "output tok/s",
    }

    made_of: dict[str, str]
    seconds: float
    served: list[Served]
    hit_rate: float

    @property
    def headline(self) -> str:
        """The outcome in a few words."""
        numbers = self.numbers()
        return f"TTFT p50 {numbers['ttft_p50_ms']:,} ms, p99 {numbers['ttft_p99_ms']:,} ms"

    def numbers(self) -> dict[str, Any]:
        """What can be compared between jobs."""
        from nanoflow.bench.serving import percentiles

        output_tokens = sum(one.output_tokens for one in self.served)
        urgent = percentiles(next(iter(self._by_priority()))[1])
        found = {
            **percentiles(self.served),
            **{f"urgent_{name}": value for name, value in urgent.items()},
            "hit_rate_percent": self.hit_rate,
            "output_tokens_per_s": output_tokens / self.seconds,
            "seconds": self.seconds,
        }
        return {name: rounded(value) for name, value in found.items()} | {
            "requests": len(self.served),
            "prompt_tokens": sum(one.prompt_tokens for one in self.served),
            "output_tokens": output_tokens,
            "preemptions": sum(one.preemptions for one in self.served),
        }

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        from nanoflow.bench.serving import percentiles

        return {
            "nanoflow": __version__,
            **self.made_of,
            **self.numbers(),
            "by_priority": {str(level): percentiles(some) for level, some in self._by_priority()},
            "served": [asdict(one) for one in self.served],
        }

    def _by_priority(self) -> Iterator[tuple[int, list[Served]]]:
        for level in sorted({one.priority for one in self.served}):
            yield level, [one for one in self.served if one.priority == level]

    def show(self) -> None:
        """Print the tables."""
        from nanoflow.bench.serving import PERCENTILES, percentiles

        show.engine(self.made_of)
        groups = [("all", self.served), *((f"priority {level}", some) for level, some in self._by_priority())]
        rows = []
        for name, some in groups if len(groups) > 2 else groups[:1]:
            found = percentiles(some)
            for what in ("ttft", "tpot", "e2e"):
                values = (rounded(found.get(f"{what}_p{percentile}_ms")) for percentile in PERCENTILES)
                rows.append((name, f"{what.upper()} ms", *values, len(some)))
        print(show.table(("requests", "time", *(f"p{p}" for p in PERCENTILES), "count"), rows))
        numbers = self.numbers()
        print(
            f"{numbers['requests']} requests, {numbers['prompt_tokens']} + {numbers['output_tokens']} tokens in "
            f"{self.seconds:.2f} s: output {numbers['output_tokens_per_s']:,} tok/s, "
            f"prefix-cache hits {self.hit_rate:.0f}%, preemptions {numbers['preemptions']}"
        )


def _once(config: ServingConfig, registry: Registry) -> None:
    _job(config, registry, Path()).show()


def _job(config: ServingConfig, registry: Registry, folder: Path) -> ServingReport:
    options = config.bench
    output = output_file("bench.output", options.output, folder)
    if (options.workload == "file") != (config.prompts_file is not None):
        raise ConfigError("bench.workload=file and prompts_file=FILE need each other; set both or none.")
    given = prompts.read_file(config.prompts_file, config.sampling) if config.prompts_file is not None else None
    from nanoflow.bench import serving  # takes seconds: what can be checked without it has been by now
    from nanoflow.core.api.llm import LLM

    with LLM.from_config(config.build, registry) as llm:
        if given is None:
            arrivals = serving.families(options, config.sampling, llm.engine.vocab_size)
        else:
            encoded = [llm.encode(prompt, index)[1] for index, prompt in enumerate(given[0])]
            arrivals = serving.poisson(encoded, given[1], options.rate, options.seed)
        llm.generate([[1, 2, 3]], config.sampling, use_tqdm=False)  # what is compiled or allocated at first use
        queried, hits = llm.stats.num_queried_tokens, llm.stats.num_hit_tokens
        clock = serving.Clock(options.step_ms / 1000 if options.step_ms else None)
        served = serving.serve(llm.engine, arrivals, clock)
        queried, hits = llm.stats.num_queried_tokens - queried, llm.stats.num_hit_tokens - hits
        report = ServingReport(llm.describe(), clock.now, served, 100 * hits / queried if queried else 0.0)
    if output:
        write_record(output, report.record())
    return report


COMMAND = HydraCommand("bench serving", "serving", ServingConfig, INTRO, _once, _job)
main = COMMAND.main
