"""`python -m nanoflow.core.engine.worker FD`: a rank that rank 0 has started on its host, with a socket to it."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.distributed.launch import end_process, join_driver
from nanoflow.core.distributed.rank_group import hang_ups

GRACE = 0.2  # seconds to end in order


def main(fd: int) -> int:
    """Execute what rank 0 sends until it is gone; the exit code."""
    link = Connection(fd)
    threading.Thread(target=end_with_rank_0, args=(link,), daemon=True).start()
    from nanoflow.core.engine.build import run_worker
    from nanoflow.core.registry.registry import Registry

    try:
        config, rank_group = join_driver(link)
    except EOFError:
        return 0  # it is gone already
    try:
        run_worker(config, Registry.load(), rank_group)
    except NanoflowError:
        return 1  # rank 0 says it
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end_with_rank_0(link: Connection) -> None:
    """Wait until the other end of the socket is closed, then end this process, whatever it does.

    It may be waiting for a device that waits for a rank that is gone. What is still to be read from the socket does
    not matter then.
    """
    hang_ups(link).poll()
    time.sleep(GRACE)
    os._exit(0)


if __name__ == "__main__":
    end_process(main(int(sys.argv[1])))
