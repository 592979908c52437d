"""The CPU's cache is sized by memory that can be had: caches of files count as free, limits of control groups hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, SamplingParams
from nanoflow.core.config.engine_config import EngineConfig
from nanoflow.core.config.errors import ConfigError, RequestError
from nanoflow.core.execution import kv_cache_size
from nanoflow.core.execution.free_memory import Memory, available_memory
from nanoflow.core.execution.kv_cache_size import pick_num_blocks, size_origin
from tests.core.sentences import raises_sentence

CPU, GIB = torch.device("cpu"), 2**30
MEMINFO = {"proc/meminfo": "MemTotal: 24000 kB\nMemFree:  100 kB\nMemAvailable:   16000 kB\n"}
AVAILABLE = 16000 * 1024
INNER, OUTER = "sys/fs/cgroup/a/b", "sys/fs/cgroup/a"
V1 = "sys/fs/cgroup/memory"


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return root


def test_what_the_system_calls_available(tmp_path: Path) -> None:
    memory = available_memory(tree(tmp_path, MEMINFO))
    assert memory == Memory(AVAILABLE, "what /proc/meminfo calls MemAvailable")


@pytest.mark.parametrize(
    ("files", "size"),
    [
        # version 2: this group, one around it, none
        ({"proc/self/cgroup": "0::/a/b", f"{INNER}/memory.max": 5000, f"{INNER}/memory.current": 2000}, 3000),
        ({"proc/self/cgroup": "0::/a/b", f"{INNER}/memory.max": "max", f"{INNER}/memory.current": 2,
          f"{OUTER}/memory.max": 5000, f"{OUTER}/memory.current": 4000}, 1000),
        ({"proc/self/cgroup": "0::/a/b", f"{INNER}/memory.max": "max", f"{INNER}/memory.current": 2}, AVAILABLE),
        # what caches files is given back
        ({"proc/self/cgroup": "0::/a/b", f"{INNER}/memory.max": 5000, f"{INNER}/memory.current": 4000,
          f"{INNER}/memory.stat": "anon 1\ninactive_file 2500\nactive_file 3"}, 3500),
        # a container that sees its own group as the root of the tree
        ({"proc/self/cgroup": "0::/../b", "sys/fs/cgroup/memory.max": 500, "sys/fs/cgroup/memory.current": 100}, 400),
        # more is used than is allowed
        ({"proc/self/cgroup": "0::/a/b", f"{INNER}/memory.max": 5000, f"{INNER}/memory.current": 9000}, 0),
        # version 1
        ({"proc/self/cgroup": "9:cpu:/x\n4:memory:/a\n0::/", f"{V1}/a/memory.limit_in_bytes": 5000,
          f"{V1}/a/memory.usage_in_bytes": 2000, f"{V1}/a/memory.stat": "total_inactive_file 500"}, 3500),
        ({"proc/self/cgroup": "4:hugetlb,memory:/docker/1", f"{V1}/memory.limit_in_bytes": 700,
          f"{V1}/memory.usage_in_bytes": 200}, 500),
        ({"proc/self/cgroup": "4:memory:/a", f"{V1}/a/memory.limit_in_bytes": 2**63 - 4096,
          f"{V1}/a/memory.usage_in_bytes": 2000}, AVAILABLE),
        # nonsense
        ({"proc/self/cgroup": "x\n0::/a/b\n::", f"{INNER}/memory.max": "lots", f"{INNER}/memory.current": "few"},
         AVAILABLE),
    ],
)  # fmt: skip
def test_limits_of_control_groups(files: dict[str, object], size: int, tmp_path: Path) -> None:
    memory = available_memory(tree(tmp_path, MEMINFO | files))
    assert memory.size == size
    assert ("limit" in memory.source) == (size != AVAILABLE)


def test_other_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory(tmp_path).size > 0
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert available_memory(tmp_path) == Memory(8 * GIB, "a guess")


@pytest.mark.parametrize(("available", "size"), [(GIB, GIB // 4), (8 * GIB, 2 * GIB), (10**15, 2 * GIB)])
def test_a_quarter_of_it_is_taken(available: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_size, "available_memory", lambda: Memory(available, "a test"))
    assert pick_num_blocks(EngineConfig(), 1024, CPU, 0) == size // 1024 - 1
    assert pick_num_blocks(EngineConfig(kv_cache_gib=1.0), 1024, CPU, 0) == 2**20 - 1
    assert pick_num_blocks(EngineConfig(num_kv_blocks=7), 1024, CPU, 0) == 7


def test_too_little_says_where_the_size_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_size, "available_memory", lambda: Memory(4096, "what a test calls available"))
    with raises_sentence(ConfigError, "1,024 bytes", "a quarter of 4,096 bytes: what a test calls available"):
        pick_num_blocks(EngineConfig(), 1024, CPU, 0)


@pytest.mark.parametrize(
    ("options", "device_type", "words"),
    [
        ({"num_kv_blocks": 3, "kv_cache_gib": 1.0}, "cpu", "as engine.num_kv_blocks says; raise it"),
        ({"kv_cache_gib": 0.5}, "cuda", "which fill engine.kv_cache_gib=0.5; raise it"),
        ({"gpu_memory_utilization": 0.7}, "cuda", "engine.gpu_memory_utilization=0.7; raise it, or free memory"),
        ({}, "cpu", "2 GiB or a quarter of the memory that was available, as engine.kv_cache_gib isn't set; set it"),
    ],
)
def test_what_to_change_for_more_blocks(options: dict[str, Any], device_type: str, words: str) -> None:
    assert words in size_origin(EngineConfig(**options), device_type)


def test_a_request_that_does_not_fit_is_told_why_the_cache_is_so_small() -> None:
    words = "5 blocks of 16 tokens, which fill engine.kv_cache_gib=0.0006; raise it, or shorten the request."
    with LLM(device="cpu", kv_cache_gib=0.0006) as llm, pytest.raises(RequestError, match=re.escape(words)):
        llm.generate([[1] * 100], SamplingParams(max_tokens=100), use_tqdm=False)
