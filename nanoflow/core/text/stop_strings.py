"""Stop strings in the text of an output that grows piece by piece."""

from __future__ import annotations


class StopStrings:
    """Finds the first stop string in a growing text, and says what can be shown of it before.

    Args:
        stop: what ends the text; none of them is empty.
        include: keep the stop string that ended it in the text.

    Attributes:
        text: all pieces, cut at the stop string once one is complete.
        found: that stop string; None before.
    """

    def __init__(self, stop: list[str], *, include: bool = False) -> None:
        self.stop = stop
        self.include = include
        self.text = ""
        self.found: str | None = None
        self.longest = max(map(len, stop))
        self.num_searched = 0  # characters in which no stop string begins any more
        self.num_shown = 0  # characters that `delta` gave out

    def add(self, piece: str, *, counts: bool = True) -> str | None:
        """Take the next piece of text; returns the stop string that it completes, if there is one.

        Where several are complete, the one that begins first wins. With `counts` false the text so far, this piece
        included, can't be part of one.
        """
        self.text += piece
        if not counts:
            self.num_searched = len(self.text)
            return None
        places = [(self.text.find(stop, self.num_searched), stop) for stop in self.stop]
        places = [(place, stop) for place, stop in places if place >= 0]
        if places:
            place, self.found = min(places)
            self.text = self.text[: place + len(self.found) if self.include else place]
        else:
            self.num_searched = max(self.num_searched, len(self.text) - self.longest + 1)
        return self.found

    def end(self, stop: str) -> str:
        """End the text by a stop string that is not in it, unless an earlier one has; returns the one that did."""
        if self.found is None:
            self.found = stop
            self.text += stop if self.include else ""
        return self.found

    def delta(self, *, is_end: bool = False) -> str:
        """Text to show since the last call. Before the end, what may yet become a stop string is held back."""
        end = len(self.text) - (0 if is_end else self._num_held_back())
        piece = self.text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return piece

    def _num_held_back(self) -> int:
        """How many of the last characters are the beginning of a stop string."""
        most = min(self.longest - 1, len(self.text) - self.num_searched)
        return next((n for n in range(most, 0, -1) if self._may_become_stop(self.text[-n:])), 0)

    def _may_become_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stop)
