"""`nanoflow run`: complete prompts with the engine that a config describes, or sweep over configs."""

from __future__ import annotations

import sys
from pathlib import Path

from nanoflow.cli import job, show
from nanoflow.cli.hydra_command import HydraCommand
from nanoflow.cli.settings import RunConfig
from nanoflow.core.registry.registry import Registry

INTRO = """\
Usage: nanoflow run [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Completes prompts with an engine put together from the options below.

  nanoflow run 'prompts=["ROMEO:", "Once more unto"]' sampling.max_tokens=32
  nanoflow run prompts_file=in.jsonl output=out.jsonl   as many as you like; run it again to go on where it stopped
  nanoflow run -m scheduler.max_num_seqs=4,16         a job for each value, and a table of them all
"""


def _complete(config: RunConfig, registry: Registry) -> None:
    viewer = show.Completions(in_a_file=bool(config.output and config.prompts_file))
    show.summary(job.run(config, registry, folder=Path(), viewer=viewer, use_tqdm=sys.stderr.isatty()))


def _job(config: RunConfig, registry: Registry, folder: Path) -> job.Report:
    return job.run(config, registry, folder=folder, viewer=job.Viewer())


COMMAND = HydraCommand("run", "config", RunConfig, INTRO, _complete, _job)
main = COMMAND.main
