"""What the commands print: completions, summaries, tables. Colour goes to terminals only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from nanoflow.core.config import ROLES

if TYPE_CHECKING:
    from nanoflow.cli.job import Report
    from nanoflow.core.types import RequestOutput

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


def completions(results: Iterable[RequestOutput]) -> None:
    """Print each prompt, in bold, with its completion running on from it."""
    results = list(results)
    for number, result in enumerate(results, start=1):
        completion = result.outputs[0]
        counts = f"{len(result.prompt_token_ids)} + {len(completion.token_ids)} tokens, {completion.finish_reason}"
        prompt = result.prompt if result.prompt is not None else f"<{len(result.prompt_token_ids)} token ids>"
        print(styled(f"--- {number}/{len(results)}: {counts} ---", DIM))
        print(f"{styled(prompt, BOLD)}{completion.text}\n")


def engine(made_of: dict[str, str]) -> None:
    """Print what ran: checkpoint, plugins, device and dtype."""
    roles = " ".join(f"{role}={made_of[role]}" for role in ROLES)
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
