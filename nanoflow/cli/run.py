"""`nanoflow run`: complete prompts with the engine that a config describes, or sweep over configs."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nanoflow.cli import hydra_app, job, run_help, show
from nanoflow.cli.settings import RunConfig
from nanoflow.cli.sweep import Sweep
from nanoflow.core.registry import Registry


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    registry = Registry.load()
    for problem in registry.problems:
        show.warn(problem)
    if "--help" in argv or "-h" in argv:
        print(run_help.text(registry))
        return 0
    composed: list[DictConfig] = []  # of a plain run, which goes on below: Hydra would wrap its errors
    sweeps: dict[Path, Sweep] = {}  # by folder; one at most

    def task(config: DictConfig) -> None:
        hydra = HydraConfig.get()
        if hydra.mode == RunMode.MULTIRUN:
            sweep = sweeps.setdefault(Path(hydra.sweep.dir), Sweep(registry))
            sweep.run(config, list(hydra.overrides.task), Path(hydra.runtime.output_dir))
        else:
            composed.append(config)

    try:
        code = hydra_app.run(argv, task, registry)
    finally:
        for folder, sweep in sweeps.items():
            sweep.finish(folder)
    for config in composed:
        _complete(RunConfig.from_composed(config, registry), registry)
    return code or int(any(sweep.failed for sweep in sweeps.values()))


def _complete(config: RunConfig, registry: Registry) -> None:
    results, report = job.run(config, registry, folder=Path(), use_tqdm=sys.stderr.isatty())
    show.completions(results)
    show.summary(report)
