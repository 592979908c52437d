"""One job of `bench`: measure, print, and write the results."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from nanoflow.bench.job import BenchJob
from nanoflow.bench.report import Report
from nanoflow.cli import prompts_file, show
from nanoflow.cli.bench.sizes import on_a_cpu
from nanoflow.cli.files import output_file, write_json
from nanoflow.cli.hydra import command_line
from nanoflow.cli.settings.commands import BenchConfig
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.registry.registry import Registry


def once(kind: str, config: BenchConfig, registry: Registry) -> None:
    """Measure in this folder, and print the tables."""
    show.report(run(kind, config, registry, Path(), progress=sys.stderr.isatty()))


def run(kind: str, config: BenchConfig, registry: Registry, folder: Path, progress: bool = False) -> Report:
    """Measure what `config` says by the module of `nanoflow.bench` for `kind`; its output files go under `folder`.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    options = config.bench
    output = output_file("bench.output", options.output, folder)
    profile = output_file("bench.profile", getattr(options, "profile", None), folder)
    name = getattr(config, "prompts_file", None)
    if (options.workload == "file") != (name is not None):
        raise ConfigError("bench.workload=file and prompts_file=FILE need each other; set both or none.")
    given = prompts_file.read(name, config.sampling) if name is not None else None
    # Imported here since it takes seconds: what can be checked without it has been by now.
    measure = import_module(f"nanoflow.bench.{kind}").measure
    plan = import_module("nanoflow.core.execution.plan")
    is_cpu = plan.pick_device(config.build.engine.device).type == "cpu"
    options, note = on_a_cpu(options, command_line.told()) if is_cpu else (options, None)
    job = BenchJob(config.build, config.sampling, options, given, profile, progress)
    report: Report = measure(job, registry)
    if note is not None:
        report = replace(report, shown=[note, *report.shown])
    if output:
        write_json("bench.output", output, report.record)
    return report
