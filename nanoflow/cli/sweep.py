"""A sweep: every job in turn, one that fails included, and a table of them all at the end."""

from __future__ import annotations

import csv
import json
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from nanoflow.cli import show
from nanoflow.core.errors import NanoflowError
from nanoflow.core.registry import Registry

if TYPE_CHECKING:
    from nanoflow.cli.hydra_command import HydraCommand

OK, FAILED, INTERRUPTED = "ok", "failed", "interrupted"


@dataclass
class Sweep:
    """The jobs that a sweep has run so far.

    Attributes:
        command: what each job runs.
        registry: the plugins that jobs choose from.
        jobs: a record of each, as it stands in the results.
        columns: of the table, with their titles; reports add theirs.
    """

    command: HydraCommand
    registry: Registry
    jobs: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=lambda: {key: key for key in ("job", "overrides", "status")})

    @property
    def failed(self) -> bool:
        """Whether any job failed."""
        return any(record["status"] == FAILED for record in self.jobs)

    def run(self, composed: DictConfig, overrides: list[str], folder: Path) -> None:
        """Run a job and leave its config and its result in `folder`; its failure is noted, not raised."""
        OmegaConf.save(composed, folder / "config.yaml")
        name = f"job {len(self.jobs)} ({' '.join(overrides)})"
        record = {"job": len(self.jobs), "overrides": overrides, "status": INTERRUPTED, "error": ""}
        self.jobs.append(record)
        try:
            config = self.command.schema.from_composed(composed, self.registry)
            report = self.command.job(config, self.registry, folder)
        except Exception as error:
            record["status"] = FAILED
            record["error"] = str(error) if isinstance(error, NanoflowError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, NanoflowError):
                traceback.print_exc()
            print(f"nanoflow: error: {name}: {record['error']}", file=sys.stderr, flush=True)
        else:
            record.update(status=OK, **report.numbers(), **report.made_of)
            self.columns |= report.columns
            print(f"{name}: {report.headline}", flush=True)
        (folder / "result.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def finish(self, folder: Path) -> None:
        """Print the table and leave it in `folder`, as text and as CSV."""
        table = self._table()
        print(f"\n{table}")
        (folder / "results.txt").write_text(table + "\n", encoding="utf-8")
        with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for record in self.jobs for key in record)))
            writer.writeheader()
            writer.writerows({**record, "overrides": " ".join(record["overrides"])} for record in self.jobs)
        print(f"\nKept in {folder}")

    def _table(self) -> str:
        shared = set.intersection(*(set(record["overrides"]) for record in self.jobs)) if len(self.jobs) > 1 else set()
        rows = [
            {**record, "overrides": " ".join(item for item in record["overrides"] if item not in shared)}
            for record in self.jobs
        ]
        return show.table(list(self.columns.values()), ([row.get(key) for key in self.columns] for row in rows))
