"""One job: build an engine, complete the prompts, and tell what it did and how fast."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.bench.report import Report
from nanoflow.cli.files import output_file
from nanoflow.cli.run import batch, prompts, records
from nanoflow.cli.run.report import Tally
from nanoflow.cli.run.view import Viewer
from nanoflow.cli.settings.commands import RunConfig
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.registry.registry import Registry

if TYPE_CHECKING:
    from nanoflow.core.api.llm import LLM


def run(config: RunConfig, registry: Registry, *, folder: Path, viewer: Viewer, use_tqdm: bool = False) -> Report:
    """Complete the prompts of `config`, and write `config.output`, if set, under `folder`.

    With an output file, prompts are read and completions written one by one, and a file that holds the beginning
    already is continued. Else all prompts are checked before the first is completed.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    path = output_file("output", config.output, folder)
    if path is None:
        return _at_once(config, registry, viewer, use_tqdm)
    return _one_by_one(config, registry, viewer, path)


def _at_once(config: RunConfig, registry: Registry, viewer: Viewer, use_tqdm: bool) -> Report:
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
        return tally.report(llm, seconds)


def _one_by_one(config: RunConfig, registry: Registry, viewer: Viewer, path: Path) -> Report:
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
        return tally.report(llm, time.perf_counter() - start)


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
