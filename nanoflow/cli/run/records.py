"""The output file of a run: a JSON object a line, in the order of the prompts, and how to go on with one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from nanoflow.cli.prompts_file import PromptAndParams
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.data.outputs import CompletionOutput, RequestOutput


class RecordsFile:
    """An output file, and how far an earlier run got with it.

    Args:
        path: of the file; need not exist.

    Attributes:
        num_done: lines that stand there already and were found to belong to the first prompts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_done = 0
        self.size = 0  # bytes of these lines; what follows is a line that was not finished

    def skip_done(self, prompts: Iterator[PromptAndParams]) -> Iterator[PromptAndParams]:
        """The prompts whose lines are not there yet. Changes nothing in the file.

        Raises:
            ConfigError: the file holds something else.
        """
        with _telling_errors(self.path):
            if not self.path.exists():
                return prompts
            with self.path.open("rb") as file:
                for line in file:
                    pair = next(prompts, None)
                    if not line.endswith(b"\n"):
                        self._require(pair is not None and _begins(line, *pair))
                        return chain([pair], prompts)
                    self._require(pair is not None and _is_of(line, *pair))
                    self.num_done += 1
                    self.size += len(line)
        return prompts

    def _require(self, belongs: bool) -> None:
        if not belongs:
            raise ConfigError(
                f"output {self.path} exists, and its line {self.num_done + 1} is not the completion of prompt "
                f"{self.num_done + 1}; delete the file to start over, or choose another one."
            )

    @contextmanager
    def append(self) -> Iterator[TextIO]:
        """The file, open for the lines that are missing. Each reaches the disk when it is written.

        Raises:
            ConfigError: it can't be written.
        """
        with _telling_errors(self.path), self.path.open("a", encoding="utf-8", buffering=1) as file:
            file.truncate(self.size)
            yield file


def line(result: RequestOutput) -> str:
    """The line of a request; `completions` holds all of them if there are several."""
    record = {
        "prompt": result.prompt,
        "prompt_token_ids": result.prompt_token_ids,
        **_completion(result.outputs[0]),
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_output_tokens": sum(len(completion.token_ids) for completion in result.outputs),
        "num_cached_tokens": result.num_cached_tokens,
        "ttft": result.metrics.ttft,
    }
    if len(result.outputs) > 1:
        record["completions"] = [_completion(completion) for completion in result.outputs]
    return json.dumps(record, ensure_ascii=False) + "\n"


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _is_of(line: bytes, prompt: dict[str, Any], params: SamplingParams) -> bool:
    """Whether a line of the file is that of `prompt`."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not isinstance(record, dict):
        return False
    shown = _shown(prompt, params, record.get("num_prompt_tokens"))
    return all(record.get(key) == value for key, value in shown.items())


def _begins(line: bytes, prompt: dict[str, Any], params: SamplingParams) -> bool:
    """Whether the end of the file may be the beginning of the line of `prompt`."""
    shown = _shown(prompt, params, None)
    start = json.dumps({"prompt": None} | shown, ensure_ascii=False).removesuffix("}").encode()
    return line.startswith(start[: len(line)])


def _shown(prompt: dict[str, Any], params: SamplingParams, length: int | None) -> dict[str, Any]:
    """What a line shows of `prompt`, of its token ids those that truncation leaves.

    Where the engine says how many these are, `length` is that number, and None leaves them out.
    """
    if "prompt_token_ids" not in prompt or params.truncate_prompt_tokens is None:
        return prompt
    if params.truncate_prompt_tokens > 0:
        length = params.truncate_prompt_tokens
    return {"prompt_token_ids": prompt["prompt_token_ids"][-length:]} if length else {}


@contextmanager
def _telling_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output {path} can't be written: {error.strerror}.") from error
