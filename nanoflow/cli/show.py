"""What the commands print: completions, summaries, tables. Colour goes to terminals only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from nanoflow.core.registry.roles import ROLES, in_config

if TYPE_CHECKING:
    from nanoflow.cli.job import Report
    from nanoflow.core.data.outputs import CompletionOutput, RequestOutput

BOLD, DIM, YELLOW = "1", "2", "33"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` with an ANSI style, or plain if `stream` (standard output) is no terminal or NO_COLOR is set."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    return f"\033[{style}m{text}\033[0m"


def warn(message: str) -> None:
    """Print a warning to standard error."""
    print(f"{styled('nanoflow: warning:', YELLOW, sys.stderr)} {message}", file=sys.stderr)


class Completions:
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

    def start(self, total: int | None, num_done: int) -> None:
        """See `job.Viewer`, also for the others."""
        self.total, self.number = total, num_done
        if num_done:
            print(f"{num_done} prompts are done already; going on after them.", file=sys.stderr)

    def grows(self, output: RequestOutput) -> None:
        if self.num_shown == 0:
            print(styled(_prompt(output), BOLD), end="")
        text = output.outputs[0].text
        print(text[self.num_shown :], end="", flush=True)
        self.num_shown = max(self.num_shown, len(text))

    def done(self, result: RequestOutput) -> None:
        self.number += 1
        if self.in_a_file:
            if sys.stderr.isatty():
                print(f"\r{self._place()}", end="\n" if self.number == self.total else "", file=sys.stderr, flush=True)
            return
        if self.num_shown:
            self.grows(result)
            print(styled(f"\n--- {_counts(result, result.outputs[0])} ---", DIM) + "\n")
            return
        for completion in result.outputs:
            which = f" ({completion.index + 1}/{len(result.outputs)})" if len(result.outputs) > 1 else ""
            print(styled(f"--- {self._place()}{which}: {_counts(result, completion)} ---", DIM))
            print(f"{styled(_prompt(result), BOLD)}{completion.text}\n")

    def _place(self) -> str:
        return f"{self.number}/{self.total}" if self.total is not None else str(self.number)


def _prompt(result: RequestOutput) -> str:
    return result.prompt if result.prompt is not None else f"<{len(result.prompt_token_ids)} token ids>"


def _counts(result: RequestOutput, completion: CompletionOutput) -> str:
    return f"{len(result.prompt_token_ids)} + {len(completion.token_ids)} tokens, {completion.finish_reason}"


def engine(made_of: dict[str, str]) -> None:
    """Print what ran: checkpoint, plugins, device and dtype."""
    roles = " ".join(f"{role}={made_of[role]}" for role in in_config(ROLES) if made_of.get(role))
    print(styled(f"{made_of['checkpoint']} | {roles} | {made_of['device']} {made_of['dtype']}", DIM))


def summary(report: Report) -> None:
    """Print what ran, and how fast."""
    engine(report.made_of)
    print(
        f"{report.requests} {'prompt' if report.requests == 1 else 'prompts'}, "
        f"{report.prompt_tokens} + {report.output_tokens} tokens in {report.seconds:.2f} s: "
        f"prompt {report.prompt_rate:,.0f} tok/s, output {report.output_rate:,.0f} tok/s, "
        f"TTFT {1000 * report.ttft:.0f} ms, prefix-cache hits {report.hit_rate:.0f}%, "
        f"preemptions {report.preemptions}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of aligned columns: those of numbers to the right, the rest to the left."""
    columns = [[title, *values] for title, *values in zip(head, *rows, strict=True)]
    return "\n".join(" | ".join(cells).rstrip() for cells in zip(*map(_aligned, columns), strict=True))


def _aligned(column: list[object]) -> list[str]:
    title, *values = ("" if value is None else str(value) for value in column)
    width = max(map(len, (title, *values)))
    align = str.rjust if any(isinstance(value, int | float) for value in column) else str.ljust
    return [align(title, width), "-" * width, *(align(value, width) for value in values)]
