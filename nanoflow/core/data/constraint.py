"""What an output may be held to, such as a grammar. It lives with its sequence."""

from __future__ import annotations

from typing import Protocol


class Constraint(Protocol):
    """What an output is held to, and how far it got; a grammar, for example."""

    def accept(self, token_id: int) -> bool:
        """Take the next token of the output; False if it can't be, and `error` says why."""

    @property
    def is_complete(self) -> bool:
        """Whether the output may end here and nothing but its end may follow."""

    def forced(self) -> list[int]:
        """Ids that the output goes on with in any case; often none."""

    @property
    def error(self) -> str:
        """A sentence about what went wrong, empty if nothing did."""
