"""One job: build an engine, complete the prompts, and tell what it did and how fast."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nanoflow.bench.report import Report
from nanoflow.cli.files import output_file
from nanoflow.cli.prompt_line import GivenPrompt
from nanoflow.cli.prompts_file import refuse_same
from nanoflow.cli.run import batch, prompts, records
from nanoflow.cli.run.records_file import opened
from nanoflow.cli.run.report import Tally
from nanoflow.cli.run.view import Viewer
from nanoflow.cli.settings.commands import RunConfig
from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.registry.registry import Registry

if TYPE_CHECKING:
    from nanoflow.core.api.llm import LLM

Rendered: TypeAlias = "tuple[str | None, list[int]]"  # a conversation's text and its token ids


def run(config: RunConfig, registry: Registry, *, folder: Path, viewer: Viewer, use_tqdm: bool = False) -> Report:
    """Complete the prompts of `config`, and write `config.output`, if set, under `folder`.

    With an output file, prompts are read and completions written one by one, and a file that holds the beginning
    already is continued. Else all prompts are checked before the first is completed.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    path = output_file("output", config.output, folder)
    refuse_same(path, config.prompts_file)
    if path is None:
        return _at_once(config, registry, viewer, use_tqdm)
    return _one_by_one(config, registry, viewer, path)


def _at_once(config: RunConfig, registry: Registry, viewer: Viewer, use_tqdm: bool) -> Report:
    given = prompts.read(config)
    viewer.start(len(given), 0)
    with _building(config, registry) as llm:
        start, tally = time.perf_counter(), Tally()
        texts, params = _rendered(llm, given), [item.params for item in given]
        plain = [item.prompt if text is None else text[1] for item, text in zip(given, texts, strict=True)]
        if viewer.streams and len(given) == 1 and params[0].n == 1:
            results = [_watched(llm, plain, params, texts[0], viewer)]
        else:
            results = llm.generate(plain, params, use_tqdm=use_tqdm)
        seconds = time.perf_counter() - start
        for result, text in zip(results, texts, strict=True):
            tally.add(result)
            viewer.done(_as_given(result, text))
        return tally.report(llm, seconds)


def _one_by_one(config: RunConfig, registry: Registry, viewer: Viewer, path: Path) -> Report:
    total = prompts.count(config)
    with opened(path) as file:
        waiting = file.skip_done(prompts.each(config))
        viewer.start(total, file.num_done)
        try:
            with _building(config, registry) as llm:
                start, tally = time.perf_counter(), Tally()
                for completed in batch.completions(llm, waiting, file.num_done, records_errors=config.records_errors):
                    file.write(records.line(completed))
                    tally.add(completed.output)
                    viewer.done(completed.output)
                viewer.end(tally.failed)
                return tally.report(llm, time.perf_counter() - start)
        except KeyboardInterrupt:
            viewer.interrupted(file.num_done, path)
            raise


def _rendered(llm: LLM, given: list[GivenPrompt]) -> list[Rendered | None]:
    """Of each conversation, what the chat template makes of it; None for other prompts.

    Raises:
        RequestError: the template does not take one.
    """
    found: list[Rendered | None] = [None] * len(given)
    for number, item in enumerate(given):
        if "messages" in item.prompt:
            with _naming_prompt(number):
                found[number] = batch.encoded(llm, item, number)
    return found


@contextmanager
def _naming_prompt(number: int) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise RequestError(f"Prompt {number}: {error}") from error


def _as_given(result: RequestOutput, text: Rendered | None) -> RequestOutput:
    """The output of a conversation with its text, which the engine was not told."""
    return result if text is None else replace(result, prompt=text[0])


def _building(config: RunConfig, registry: Registry) -> LLM:
    from nanoflow.core.api.llm import LLM  # takes seconds: what can be checked without it has been by now

    return LLM.from_config(config.build, registry)


def _watched(
    llm: LLM, texts: list[Any], params: list[SamplingParams], text: Rendered | None, viewer: Viewer
) -> RequestOutput:
    """The only prompt's output, shown while it grows."""
    for output in llm.stream(texts, [replace(params[0], output_kind=RequestOutputKind.CUMULATIVE)]):
        if output.finished:
            return output
        viewer.grows(_as_given(output, text))
    raise AssertionError("a stream ends with a finished output")
