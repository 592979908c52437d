"""Starts with an empty and with a full cache of Triton's, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.config.errors import PluginError
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.registry.registry import Registry

# Writes the kernels that were looked for in Triton's cache, whether they were there, and whether anything was started.
# Without a guard around it, as users write scripts.
START = """
import json, subprocess, sys
import triton
looked_for, started = [], []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: looked_for.append((src.name, cache_hit))
popen = subprocess.Popen
def start(command, *args, **options):
    started.append(command)
    return popen(command, *args, **options)
subprocess.Popen = start
from nanoflow import LLM, SamplingParams
with LLM("bard", device="cuda", attention=sys.argv[1], max_num_seqs=64) as llm:
    num_looked_for = len(looked_for)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
traced = any("nanoflow.core.warmup.trace_kernels" in map(str, command) for command in started)
print(json.dumps((looked_for, num_looked_for, traced)))
"""


def start(attention: str, cache: Path) -> tuple[list[str], list[str], bool]:
    """The kernels that were found, those that were not, and whether the process had help."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", START, attention]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    looked_for, num_looked_for, helped = json.loads(process.stdout.splitlines()[-1])
    assert len(looked_for) == num_looked_for > 0  # requests compile nothing
    return [name for name, hit in looked_for if hit], [name for name, hit in looked_for if not hit], helped


@pytest.mark.parametrize("attention", ["triton", "hybrid"])
def test_a_cold_start_compiles_nothing_itself(attention: str, tmp_path: Path) -> None:
    shape = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "scale": 1.0, "block_size": 16}
    context = AttentionContext(**shape, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    try:
        Registry.load().resolve("attention", PluginChoice(attention), context)
    except PluginError as error:
        pytest.skip(str(error))
    found, missed, helped = start(attention, tmp_path)
    (log,) = (tmp_path / "nanoflow").iterdir()
    assert helped
    assert missed == [], log.read_text()
    again, missed, helped = start(attention, tmp_path)
    assert not helped
    assert (sorted(again), missed) == (sorted(found), [])
