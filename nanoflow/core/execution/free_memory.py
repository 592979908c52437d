"""How much of the host's memory can still be had: what the system calls available, within limits of control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KIB = 2**10
UNKNOWN = 8 * 2**30  # where the system doesn't tell
ROOT = Path("/")


class Memory(NamedTuple):
    """Bytes, and where their number comes from."""

    size: int
    source: str


def available_memory(root: Path = ROOT) -> Memory:
    """Memory that a new buffer may take. What caches files counts, for the system gives it back.

    Args:
        root: of the file system in which Linux tells; a test has one of its own.
    """
    found = [_available(root), *_left_in_groups(root)]
    return min((memory for memory in found if memory is not None), default=Memory(UNKNOWN, "a guess"))


def _available(root: Path) -> Memory | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return Memory(int(kib) * KIB, "what /proc/meminfo calls MemAvailable")
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return Memory(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the system's free pages")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _left_in_groups(root: Path) -> Iterator[Memory]:
    """What each limit on this process's control groups, and on those around them, leaves."""
    for folder, limit_file, usage_file, cached in _groups(root):
        try:
            limit = (folder / limit_file).read_text().strip()
            if limit == "max":
                continue
            used = int((folder / usage_file).read_text()) - _stat(folder / "memory.stat", cached)
            yield Memory(max(0, int(limit) - max(0, used)), f"what the control group's limit leaves ({limit_file})")
        except (OSError, ValueError):
            continue


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of control groups, the innermost first: with the names of limit and usage, and of cached files in use."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # version 2
            tree, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            tree = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            # In a container, the path is the host's, and the tree that is mounted begins at the group itself.
            yield tree.joinpath(*parts[:length]), *names


def _stat(file: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name)
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
