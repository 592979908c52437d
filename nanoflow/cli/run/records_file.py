"""The output file of a run, and how to go on with one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from nanoflow.cli.prompt_line import GivenPrompt
from nanoflow.cli.run import records
from nanoflow.core.config.errors import ConfigError


class RecordsFile:
    """An output file that no other run writes to, and how far an earlier run got with it. `opened` makes one.

    Attributes:
        num_done: lines that stand there and belong to the first prompts.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.num_done = 0
        self.size = 0  # bytes of these lines; what follows is a line that was not finished
        self.unfinished = 0  # bytes of that one
        self.touched = False  # whether this run has changed it

    def skip_done(self, prompts: Iterator[GivenPrompt]) -> Iterator[GivenPrompt]:
        """The prompts whose lines are not there yet. Changes nothing in the file.

        Raises:
            ConfigError: the file holds something else.
        """
        with telling_errors(self.path):
            self.file.seek(0)
        for line in self.file:
            given = next(prompts, None)
            if not line.endswith(b"\n"):
                self.unfinished = len(line)
                unfinished = line.rstrip(b"\0")  # where power failed, space may be there that was never written
                self._require(given is not None and records.begins(unfinished, given))
                return chain([given], prompts)
            self._require(given is not None and records.is_of(line, given))
            self.num_done += 1
            self.size += len(line)
        return prompts

    def write(self, line: bytes) -> None:
        """Append a line, which reaches the system before this returns.

        Raises:
            ConfigError: the file was removed or replaced, or another program writes to it.
        """
        self.check()
        with telling_errors(self.path):
            self._append(line)
        self.size += len(line)
        self.num_done += 1

    def _append(self, line: bytes) -> None:
        unfinished = 0 if self.touched else self.unfinished
        if os.fstat(self.file.fileno()).st_size != self.size + unfinished:  # noticed where there are no locks, too
            raise ConfigError(
                f"output {self.path} is being written by another program as well; end that one, and choose another "
                "file if the two are to run at once."
            )
        if not self.touched:
            self.touched = True
            self.file.truncate(self.size)
        rest = line
        while rest:
            rest = rest[os.write(self.file.fileno(), rest) :]

    def check(self) -> None:
        """Make sure that what is written can be found under the file's name.

        Raises:
            ConfigError: it can't.
        """
        if not self.is_there():
            raise ConfigError(
                f"output {self.path} was removed, renamed or replaced while the run went on, and its {self.num_done} "
                "completions with it; run the command again."
            )

    def is_there(self) -> bool:
        """Whether the file still has its name."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def _require(self, belongs: bool) -> None:
        if not belongs:
            raise ConfigError(
                f"output {self.path} exists, and its line {self.num_done + 1} is not the completion of prompt "
                f"{self.num_done + 1}; delete the file to start over, or choose another one."
            )


@contextmanager
def opened(path: Path) -> Iterator[RecordsFile]:
    """The output file at `path`, for this run alone. One that is made, and gets no line, is removed again.

    Raises:
        ConfigError: it can't be written, another run has it, or it was gone in the end.
    """
    is_new = not path.exists()
    with telling_errors(path):
        file = path.open("ab+")
    with file:
        if not _locked(file):
            raise ConfigError(f"output {path} is being written by another run; wait for its end, or choose another.")
        found = RecordsFile(path, file)
        try:
            yield found
            found.check()
        finally:
            unused = is_new and not found.touched and found.is_there()
            if unused:
                path.unlink(missing_ok=True)


def _locked(file: BinaryIO) -> bool:
    """Whether this run has the file now; also where system or file system know no locks, as `write` notices others."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def telling_errors(path: Path) -> Iterator[None]:
    """Say of an error of the system that it is about the output file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output {path} can't be written: {error.strerror}.") from error
