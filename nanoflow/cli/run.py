"""`nanoflow run`: complete prompts with the engine that a config describes, or sweep over configs."""

from __future__ import annotations

import sys
from pathlib import Path

from nanoflow.cli import job, show
from nanoflow.cli.hydra_command import HydraCommand
from nanoflow.cli.settings import RunConfig
from nanoflow.core.registry import Registry

INTRO = """\
Usage: nanoflow run [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Completes prompts with an engine put together from the options below.

  nanoflow run 'prompts=["ROMEO:", "Once more unto"]' sampling.max_tokens=32
  nanoflow run -m scheduler.max_num_seqs=4,16         a job for each value, and a table of them all
"""


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    return HydraCommand("run", "config", RunConfig, INTRO, _complete, _job).main(argv)


def _complete(config: RunConfig, registry: Registry) -> None:
    results, report = job.run(config, registry, folder=Path(), use_tqdm=sys.stderr.isatty())
    show.completions(results)
    show.summary(report)


def _job(config: RunConfig, registry: Registry, folder: Path) -> job.Report:
    return job.run(config, registry, folder=folder, use_tqdm=False)[1]
