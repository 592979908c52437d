"""How many cores of the host this process may use."""

from __future__ import annotations

import os
import time
from pathlib import Path

ROOT = Path("/")
LOOKS, PAUSE = 5, 0.01  # at what runs now, and seconds between two of them


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy, by its affinity and the limits of its control groups; at least 1.

    Args:
        root: of the file system in which Linux tells; a test has one of its own.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        cores = os.cpu_count() or 1
    return max(1, min([cores, *_quotas(root)]))


def busy_cores(root: Path = ROOT) -> float:
    """Cores that other threads of the host want, in the last minute and still now; 0 where the system doesn't tell.

    It looks a few times, for 40 ms together. What has just ended doesn't count, such as the last job of a sweep.
    """
    try:
        last_minute = os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
    now = 0
    for look in range(LOOKS):
        time.sleep(PAUSE if look else 0)
        try:
            running = (root / "proc/loadavg").read_text().split()[3].partition("/")[0]
            now = max(now, int(running) - 1)  # this one runs, too
        except (OSError, ValueError, IndexError):
            return last_minute
    return min(last_minute, now)


def _quotas(root: Path) -> list[int]:
    """Cores that control groups leave, rounded up; none for those without a limit."""
    found = []
    for folder in _groups(root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()  # version 2
        except (OSError, ValueError):
            try:
                quota, period = (str(int((folder / f"cpu.cfs_{name}_us").read_text())) for name in ("quota", "period"))
            except (OSError, ValueError):
                continue
        if quota.isdigit() and int(quota) > 0:
            found.append(max(1, -(-int(quota) // int(period))))
    return found


def _groups(root: Path) -> list[Path]:
    """Folders of this process's control groups and of those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tree = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            tree = root / "sys/fs/cgroup/cpu"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [tree.joinpath(*parts[:length]) for length in range(len(parts) + 1)]
    return folders
