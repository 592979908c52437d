"""What `nanoflow run` prints while it goes on."""

from __future__ import annotations

import sys
from pathlib import Path

from nanoflow.cli import show
from nanoflow.cli.run.progress import BatchProgress
from nanoflow.core.data.outputs import CompletionOutput, RequestOutput


class Viewer:
    """Is told of what a job brings; this one lets it pass.

    Attributes:
        streams: whether it wants to see the output of a lone prompt while it grows.
    """

    streams = False

    def start(self, total: int | None, num_done: int) -> None:
        """There are `total` prompts, None if nobody knows, the first `num_done` of which are done already."""

    def grows(self, output: RequestOutput) -> None:
        """The output so far of the only prompt, which is not finished."""

    def done(self, result: RequestOutput) -> None:
        """The next prompt's output."""

    def end(self, num_failed: int) -> None:
        """All prompts are done; so many could not be served."""

    def interrupted(self, num_done: int, path: Path) -> None:
        """The user stopped it when the first `num_done` prompts were done and in the file."""


class Completions(Viewer):
    """Prints prompts, in bold, with their completions running on from them.

    Args:
        in_a_file: they are written to a file that was meant for them, so that only the progress is shown.
    """

    def __init__(self, in_a_file: bool = False) -> None:
        self.streams = sys.stdout.isatty()
        self.in_a_file = in_a_file
        self.total: int | None = None
        self.number = 0
        self.num_shown = 0  # characters of a text that grows
        self.bar: BatchProgress | None = None

    def start(self, total: int | None, num_done: int) -> None:
        self.total, self.number = total, num_done
        if num_done:
            print(f"{num_done} prompts are done already; going on after them.", file=sys.stderr)
        if self.in_a_file and sys.stderr.isatty():
            self.bar = BatchProgress(total, num_done)

    def grows(self, output: RequestOutput) -> None:
        if self.num_shown == 0:
            print(show.styled(_prompt(output), show.BOLD), end="")
        text = output.outputs[0].text
        print(text[self.num_shown :], end="", flush=True)
        self.num_shown = max(self.num_shown, len(text))

    def done(self, result: RequestOutput) -> None:
        self.number += 1
        if self.in_a_file:
            if self.bar is not None:
                self.bar.add(result)
            return
        if self.num_shown:
            self.grows(result)
            print(show.styled(f"\n--- {_counts(result, result.outputs[0])} ---", show.DIM) + "\n")
            return
        for completion in result.outputs:
            which = f" ({completion.index + 1}/{len(result.outputs)})" if len(result.outputs) > 1 else ""
            print(show.styled(f"--- {self._place()}{which}: {_counts(result, completion)} ---", show.DIM))
            print(f"{show.styled(_prompt(result), show.BOLD)}{completion.text}\n")

    def end(self, num_failed: int) -> None:
        if self.bar is not None:
            self.bar.close()
        if num_failed:
            what = "prompt" if num_failed == 1 else "prompts"
            show.warn(f'{num_failed} {what} could not be served; finish_reason is "error" in the records that say why.')

    def interrupted(self, num_done: int, path: Path) -> None:
        if self.bar is not None:
            self.bar.close()
        of = f" of {self.total}" if self.total is not None else ""
        print(f"Stopped: {num_done}{of} prompts are in {path}; run the same command again to go on.", file=sys.stderr)

    def _place(self) -> str:
        return f"{self.number}/{self.total}" if self.total is not None else str(self.number)


def _prompt(result: RequestOutput) -> str:
    return result.prompt if result.prompt is not None else f"<{len(result.prompt_token_ids)} token ids>"


def _counts(result: RequestOutput, completion: CompletionOutput) -> str:
    total = completion.cumulative_logprob
    logprob = f", log-probability {total:.2f}" if total is not None else ""
    return f"{len(result.prompt_token_ids)} + {len(completion.token_ids)} tokens, {completion.finish_reason}{logprob}"
