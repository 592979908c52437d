"""What is known of an engine before anything takes memory: device, dtype, longest sequence, the scheduler's options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanoflow.core.config.engine_config import Config, SchedulerConfig
from nanoflow.core.config.errors import CheckpointError, ConfigError
from nanoflow.core.distributed.launch import rank_device
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.loading import hub
from nanoflow.core.registry.registry import Registry

# Tokens in a batch. A GPU is busier with larger chunks, and there they are short; a CPU is busy with any.
GPU_TOKENS, CPU_TOKENS = 8192, 2048


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
    folder = hub.resolve(config.checkpoint)
    hf_config = HFConfig(hub.read_config(folder))
    device = rank_device(pick_device(options.device), rank_group)
    scheduler_config: SchedulerConfig = registry.resolve("scheduler", config.plugins.get("scheduler"))[1]
    if scheduler_config.max_num_batched_tokens is None:
        budget = max(GPU_TOKENS if device.type == "cuda" else CPU_TOKENS, scheduler_config.max_num_seqs)
        scheduler_config = replace(scheduler_config, max_num_batched_tokens=budget)
    dtype = pick_dtype(options.dtype, hf_config, device)
    model_entry, _ = registry.model_for(config.plugins.get("model"), hf_config.get("architectures") or [])
    max_model_len = pick_max_model_len(options.max_model_len, hf_config[model_entry.component.positions_key])
    return Plan(folder, hf_config, device, dtype, max_model_len, scheduler_config)


class HFConfig(dict[str, Any]):
    """A checkpoint's config.json, in which a key that the model needs and that is absent is the user's to mend."""

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"The checkpoint's config.json has no {key!r}, which its architecture needs.")


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"engine.device={name} asks for a GPU, but there are {torch.cuda.device_count()} here; use cpu."
        )
    return device


def pick_dtype(name: str, hf_config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The dtype of that name. `auto`: float32 on a CPU, else the checkpoint's, where float32 becomes bfloat16."""
    if name == "auto":
        stored = hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16"
        name = "float32" if device.type == "cpu" else "bfloat16" if stored == "float32" else stored
    return getattr(torch, name)


def pick_max_model_len(wanted: int | None, limit: int) -> int:
    """The longest sequence, prompt and output together, of a model for `limit` tokens.

    Raises:
        ConfigError: more than the model has positions for.
    """
    if wanted is not None and wanted > limit:
        raise ConfigError(f"engine.max_model_len is {wanted}, but the checkpoint serves at most {limit} tokens.")
    return wanted or limit


def device_name(device: torch.device, count: int = 1) -> str:
    """What to call so many of the device in reports."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return name if count == 1 else f"{count} x {name}"
