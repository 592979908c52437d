"""`core` can be imported where the system lacks what Linux has."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib, importlib.abc, os, pkgutil, select, signal, socket, sys
import torch, torch.distributed  # theirs to take care of
import multiprocessing.connection, subprocess, tempfile, asyncio, selectors

for module, names in {names}:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios", "tty", "pwd", "grp"):
            raise ModuleNotFoundError(name)

for name in ("fcntl", "resource", "termios", "tty", "pwd", "grp"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
import nanoflow.core
names = [module.name for module in pkgutil.walk_packages(nanoflow.core.__path__, "nanoflow.core.")]
from nanoflow.core.kernels.register import select_ops
failed = []
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            failed.append(f"{{name}}: {{error}}")
    except Exception as error:
        failed.append(f"{{name}}: {{error!r}}")
from nanoflow import LLM, SamplingParams
with LLM(device="cpu", num_kv_blocks=8) as llm:
    print(len(llm.generate([[1, 2]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)))
try:
    LLM(device="cpu", num_kv_blocks=8, tensor_parallel_size=2)
except Exception as error:
    print(type(error).__name__, error)
print(len(names), failed)
"""
WINDOWS = """(
    (select, ("poll", "epoll", "POLLIN", "POLLOUT", "POLLHUP", "POLLRDHUP", "kqueue")),
    (signal, ("SIGKILL", "SIGSTOP", "SIGCONT", "SIGHUP", "SIGUSR1", "pthread_sigmask", "SIGALRM")),
    (os, ("sched_getaffinity", "sched_setaffinity", "fork", "killpg", "getuid", "geteuid", "getloadavg", "setsid",
          "sysconf", "O_ASYNC", "register_at_fork", "getpgid", "wait4", "WNOHANG")),
    (socket, ("AF_UNIX", "send_fds", "recv_fds", "SO_PEERCRED", "socketpair")),
)"""
MACOS = """(
    (select, ("epoll", "POLLRDHUP")),
    (os, ("sched_getaffinity", "sched_setaffinity")),
    (socket, ("SO_PEERCRED",)),
)"""


def lines_on(names: str) -> list[str]:
    """What the code says on a system that lacks these names."""
    command = [sys.executable, "-c", CODE.format(names=names)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_windows() -> None:
    served, several, imported = lines_on(WINDOWS)
    assert served == "1"
    assert several == "ConfigError engine.tensor_parallel_size is 2, which this system can't do; set it to 1."
    assert imported.endswith("[]")
    assert int(imported.split()[0]) > 100


def test_macos() -> None:
    *_, imported = lines_on(MACOS)
    assert imported.endswith("[]")
