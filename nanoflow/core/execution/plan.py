"""What is known of an engine before anything takes memory: device, dtype, longest sequence, the scheduler's options."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanoflow.core.config.engine_config import Config, SchedulerConfig
from nanoflow.core.config.errors import CheckpointError, ConfigError, shown
from nanoflow.core.config.fields import is_int
from nanoflow.core.distributed.launch import rank_device
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.layers.rope_settings import stretched_length
from nanoflow.core.loading.hf_config import HFConfig, read_config, stored_dtype
from nanoflow.core.loading.hub import resolve
from nanoflow.core.loading.safetensors import has_own_head
from nanoflow.core.registry.registry import Registry

# Tokens in a batch. A GPU is busier with larger chunks, and there they are short; a CPU is busy with any.
GPU_TOKENS, CPU_TOKENS = 8192, 2048
MOST_TOKENS = 2**24  # in a sequence: float32, in which angles are computed, tells no more positions apart
MOST_UNASKED = 2**20  # as long as max_model_len isn't set


@dataclass(frozen=True)
class Plan:
    """What is known of an engine before anything takes memory.

    Attributes:
        folder: the checkpoint's.
        hf_config: its config.json.
        device: of this rank.
        dtype: of parameters, activations and the KV cache.
        max_model_len: most tokens in a sequence.
        scheduler_config: the scheduler's options, with its budget set.
    """

    folder: Path
    hf_config: HFConfig
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    scheduler_config: SchedulerConfig


def make_plan(config: Config, registry: Registry, rank_group: RankGroup) -> Plan:
    """Read the checkpoint's config, and choose what follows from it; see `build_engine` for what it raises."""
    options = config.engine
    has_weights = options.load_format != "dummy"
    folder = resolve(config.checkpoint, weights=has_weights, revision=options.revision)
    hf_config = read_config(folder)
    device = rank_device(pick_device(options.device), rank_group)
    scheduler_config: SchedulerConfig = registry.resolve("scheduler", config.plugins.get("scheduler"))[1]
    if scheduler_config.max_num_batched_tokens is None:
        budget = max(GPU_TOKENS if device.type == "cuda" else CPU_TOKENS, scheduler_config.max_num_seqs)
        scheduler_config = replace(scheduler_config, max_num_batched_tokens=budget)
    dtype = pick_dtype(options.dtype, hf_config, device)
    model_entry, _ = registry.model_for(config.plugins.get("model"), hf_config.get("architectures") or [])
    max_model_len = pick_max_model_len(options.max_model_len, hf_config, model_entry.component.positions_key)
    if has_weights:
        _untie(folder, hf_config)
    return Plan(folder, hf_config, device, dtype, max_model_len, scheduler_config)


def _untie(folder: Path, hf_config: HFConfig) -> None:
    """A head that is stored and unlike the token embedding is used, whatever config.json says of the two."""
    said = hf_config.get("tie_word_embeddings")
    if said is False or not has_own_head(folder):
        return
    hf_config["tie_word_embeddings"] = False
    if said:
        warnings.warn(
            f"The checkpoint in {folder} holds an output head that is unlike its token embedding, and it is used, "
            "though config.json ties the two; set tie_word_embeddings to false there.",
            stacklevel=3,
        )


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):  # no such name, or no text in valid Unicode
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device must be auto, cpu, cuda or cuda:N, got {name!r:.80}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"engine.device={name} asks for a GPU, but there are {torch.cuda.device_count()} here; use cpu."
        )
    return device


def pick_dtype(name: str, hf_config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The dtype of that name. `auto`: float32 on a CPU, else the checkpoint's if it has 16 bits, else bfloat16.

    Raises:
        CheckpointError: the checkpoint's is asked for, and is none that weights can be in.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if stored_dtype(hf_config) == "float16" else torch.bfloat16
    return getattr(torch, name)


def pick_max_model_len(wanted: int | None, hf_config: dict[str, Any], positions_key: str) -> int:
    """The longest sequence, prompt and output together.

    Args:
        wanted: as told; None for as long as the model serves.
        hf_config: of the model, which serves as many tokens as it has positions, times what its rotation is stretched.
        positions_key: what config.json calls their number.

    Raises:
        ConfigError: more than the model serves, or than positions can be told apart.
        CheckpointError: a number of positions that is none, or too large to be taken without being asked for.
    """
    positions = hf_config[positions_key]
    if not is_int(positions) or positions < 1:
        raise CheckpointError(
            f"The checkpoint's config.json: {positions_key} must be an integer >= 1, got {shown(positions):.60}."
        )
    limit = stretched_length(hf_config, positions)
    if wanted is None and limit > MOST_UNASKED:
        raise CheckpointError(
            f"The checkpoint's config.json says {positions_key}={shown(positions):.60}, and tables for so many tokens "
            f"take much memory; set engine.max_model_len to as many as you need, at most {min(limit, MOST_TOKENS):,}."
        )
    if wanted is not None and wanted > min(limit, MOST_TOKENS):
        raise ConfigError(
            f"engine.max_model_len is {wanted}, but the checkpoint serves at most {min(limit, MOST_TOKENS)} tokens."
        )
    return wanted or limit


def device_name(device: torch.device, count: int = 1, num_threads: int | None = None) -> str:
    """What to call so many of the device in reports; on a CPU with the threads that each computes with."""
    threads = torch.get_num_threads() if num_threads is None else num_threads
    on_cpu = f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return name if count == 1 else f"{count} x {name}"
