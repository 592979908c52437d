"""One job of `bench`: measure, print, and write the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from nanoflow.bench.rounds import Rounds
from nanoflow.cli.bench import report
from nanoflow.cli.bench.report import BenchReport
from nanoflow.cli.bench.settings import BenchConfig
from nanoflow.cli.hydra_command import HydraCommand
from nanoflow.cli.job import output_file
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.registry.registry import Registry

Measure: TypeAlias = Callable[[Any, Registry, Rounds, "Path | None"], BenchReport]


def command(name: str, schema: type[BenchConfig], intro: str, measure: Measure) -> HydraCommand:
    """The subcommand `bench NAME`.

    Args:
        name: also that of its primary config.
        schema: its settings.
        intro: the first lines of its help.
        measure: gets the settings, the plugins, how often to measure, and the file for a trace.
    """

    def once(config: BenchConfig, registry: Registry) -> None:
        report.show_all(run(measure, config, registry, folder=Path(), progress=sys.stderr.isatty()))

    def job(config: BenchConfig, registry: Registry, folder: Path) -> BenchReport:
        return run(measure, config, registry, folder=folder, progress=False)

    return HydraCommand(f"bench {name}", name, schema, intro, once, job)


def run(measure: Measure, config: BenchConfig, registry: Registry, *, folder: Path, progress: bool) -> BenchReport:
    """Measure what `config` says; its output files go under `folder`.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    options = config.bench
    output = output_file("bench.output", options.output, folder)
    profile = output_file("bench.profile", options.profile, folder)
    measured = measure(config, registry, Rounds(options.warmup, options.repeats, progress), profile)
    if output:
        write_record(output, measured.record())
    return measured


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write the file of `bench.output`.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"bench.output {output} can't be written: {error.strerror}.") from error
