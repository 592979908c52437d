"""A sweep: jobs that leave their results in folders, one that fails included, and a table of them all at the end.

Jobs share nothing but the sweep's folder, so that any of Hydra's launchers may run them, in other processes too.
"""

from __future__ import annotations

import sys
import traceback
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nanoflow.cli.hydra import gpus
from nanoflow.cli.hydra.command import HydraCommand
from nanoflow.cli.hydra.config_source import settings
from nanoflow.cli.hydra.quoting import one_line
from nanoflow.cli.results import jobs
from nanoflow.cli.results.table import Results
from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.registry.registry import Registry


def run(command: HydraCommand, registry: Registry, composed: DictConfig) -> None:
    """Run a job, in a process of its own if it uses a GPU, so that it finds the GPU's memory as the first one did.

    It leaves its config and its result in its folder; its failure is noted there, not raised.
    """
    hydra = HydraConfig.get()
    folder, number = Path(hydra.runtime.output_dir), hydra.job.num
    OmegaConf.save(composed, folder / "config.yaml")
    jobs.begin(folder, number, list(map(one_line, hydra.overrides.task)))
    if not gpus.wanted(composed):
        _run(command, registry, composed, folder)
        return
    with gpus.reserved(composed, number, folder.parent):
        process = get_context("spawn").Process(target=_run_in_process, args=(command, composed, folder))
        process.start()
        process.join()
    if process.exitcode:
        _fail(folder, f"its process ended with exit code {process.exitcode}.")


def _run_in_process(command: HydraCommand, composed: DictConfig, folder: Path) -> None:
    _run(command, Registry.load(), composed, folder)


def _run(command: HydraCommand, registry: Registry, composed: DictConfig, folder: Path) -> None:
    try:
        report = command.job(settings(command.schema, composed, registry), registry, folder)
    except Exception as error:
        if isinstance(error, NanoflowError):
            _fail(folder, str(error))
        else:
            traceback.print_exc()
            _fail(folder, f"{type(error).__name__}: {error}")
    else:
        record = jobs.succeed(folder, report.columns, {**report.numbers, **report.description})
        print(f"{_name(record)}: {report.headline}\n", end="", flush=True)  # one piece, beside other jobs'


def _fail(folder: Path, error: str) -> None:
    record = jobs.fail(folder, error)
    print(f"nanoflow: error: {_name(record)}: {error}", file=sys.stderr, flush=True)


def _name(record: dict) -> str:
    return f"job {record['job']} ({' '.join(record['overrides'])})"


class NotesFolder(Callback):
    """Makes Hydra's config known before the first job, which may run in another process; `hydra.callbacks` has it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        assert config.hydra.sweep.dir  # looked up once, so that `now` is in the cache
        known = deepcopy(config)
        OmegaConf.copy_cache(config, known)
        HydraConfig.instance().set_config(known)


def folder() -> Path | None:
    """That of the sweep which Hydra ran last, if any of its jobs has begun."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    found = Path(HydraConfig.get().sweep.dir)
    return found if jobs.folders(found) else None


def finish(folder: Path) -> bool:
    """Print the table of a sweep's jobs, and leave it in its folder as text and as CSV; whether all went well."""
    found = Results.read(folder)
    print(f"\n{found.table()}")
    (folder / "results.txt").write_text(found.table() + "\n", encoding="utf-8")
    found.write_csv(folder / "results.csv")
    print(f"\nKept in {folder}")
    return all(record["status"] != jobs.FAILED for record in found.jobs)
