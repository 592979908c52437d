"""`python -m nanoflow.core.engine.worker FD`: a rank that rank 0 has started on its host, with a socket to it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.distributed.launch import end_process, join_driver
from nanoflow.core.distributed.processes import hang_ups

GRACE = 0.2  # seconds to end in order


def main(fd: int) -> int:
    """Execute what rank 0 sends until it is gone; the exit code."""
    try:
        config, rank_group, folder = join_driver(socket.socket(fileno=fd))
    except (EOFError, OSError):
        return 0  # it is gone already
    threading.Thread(target=end_with_rank_0, args=(rank_group.link, folder), daemon=True).start()
    from nanoflow.core.engine.build import run_worker
    from nanoflow.core.registry.registry import Registry

    try:
        run_worker(config, Registry.load(), rank_group)
    except NanoflowError:
        return 1  # rank 0 says it
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # rank 0 may have been killed, and the engine ends in any case
    return 0


def end_with_rank_0(link: Connection, folder: str | None = None) -> None:
    """Wait until the other end of the socket is closed, then end this process, whatever it does.

    It may be waiting for a device that waits for a rank that is gone. What is still to be read from the socket does
    not matter then. The ranks' folder is removed first.
    """
    hang_ups(link).poll()
    time.sleep(GRACE)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    end_process(main(int(sys.argv[1])))
