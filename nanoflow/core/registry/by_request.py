"""The plugins of a role from which each request chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nanoflow.core.config.errors import RequestError, did_you_mean


@dataclass(frozen=True)
class ByRequest(Mapping[str, Any]):
    """What was built for a role of cardinality `by_request`, by the plugins' names; made once for an engine.

    Attributes:
        noun: what a plugin of the role is called in messages.
        products: the objects that serve the role, by name.
        reasons: why others that are installed can't be used here, in a sentence each.
    """

    noun: str
    products: Mapping[str, Any]
    reasons: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        """The object of that name.

        Raises:
            RequestError: there is none, or it can't be used here; the message says what would be right.
        """
        if name in self.products:
            return self.products[name]
        if name in self.reasons:
            raise RequestError(self.reasons[name])
        known = sorted(self.products)
        raise RequestError(
            f"There is no {self.noun} called {name!r}; installed are: {', '.join(known) or 'none'}."
            f"{did_you_mean(str(name), known)}"
        )

    def __contains__(self, name: object) -> bool:
        return name in self.products

    def __iter__(self) -> Iterator[str]:
        return iter(self.products)

    def __len__(self) -> int:
        return len(self.products)
