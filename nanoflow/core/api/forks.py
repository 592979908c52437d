"""Sentences in place of what hangs in a forked process, to which no thread of its parent comes along."""

from __future__ import annotations

import os

import torch

from nanoflow.core.config.errors import NanoflowError

LOADED_IN = os.getpid()
SPAWN = 'multiprocessing.get_context("spawn")'


def made_in_another(pid: int, what: str) -> NanoflowError:
    """What to raise where this is another process than `pid`, in which `what` was made."""
    return NanoflowError(
        f"This {what} was made in process {pid}, of which this one is a fork, and can't be used here; make a new "
        f"one in each process, started with {SPAWN}."
    )


def check_can_start(device: str) -> None:
    """Raise `NanoflowError` if an engine would hang or fail here, since this process is a fork of one that had loaded
    PyTorch. `device` is the engine's option."""
    if os.getpid() == LOADED_IN:
        return
    if device != "cpu" and torch.cuda.is_available():
        if torch.cuda._is_in_bad_fork():
            raise NanoflowError(f"This process is a fork of one that used the GPU; start it with {SPAWN}.")
    elif torch.get_num_threads() > 1:
        raise NanoflowError(
            f"This process is a fork of one that had loaded PyTorch, in which computing with several threads can hang; "
            f"start it with {SPAWN}, or call torch.set_num_threads(1) in it first."
        )
