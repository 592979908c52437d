"""The command `nanoflow run`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from nanoflow.bench.report import Report
from nanoflow.cli import show
from nanoflow.cli.hydra import app, command_line
from nanoflow.cli.hydra.command import HydraCommand
from nanoflow.cli.run import job
from nanoflow.cli.run.view import Completions, Viewer
from nanoflow.cli.settings.commands import RunConfig
from nanoflow.core.registry.registry import Registry

INTRO = """\
Usage: nanoflow run [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Completes prompts with an engine put together from the options below.

  nanoflow run 'prompts=["ROMEO:", "Once more unto"]' sampling.max_tokens=32
  nanoflow run prompts_file=in.jsonl output=out.jsonl   as many as you like; run it again to go on where it stopped
  nanoflow run -m scheduler.max_num_seqs=4,16         a job for each value, and a table of them all
"""


def _complete(config: RunConfig, registry: Registry) -> None:
    if config.prompts_file is not None and "prompts" in command_line.told():
        show.warn("prompts is not used, as prompts_file takes its place; leave out one of the two.")
    viewer = Completions(in_a_file=bool(config.output and config.prompts_file))
    show.report(job.run(config, registry, folder=Path(), viewer=viewer, use_tqdm=sys.stderr.isatty()))


def _job(config: RunConfig, registry: Registry, folder: Path) -> Report:
    return job.run(config, registry, folder=folder, viewer=Viewer())


COMMAND = HydraCommand("run", "config", INTRO, _complete, _job)
main = partial(app.main, COMMAND)
