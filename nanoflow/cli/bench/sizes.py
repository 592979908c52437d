"""Sizes of the built-in workloads on a CPU: small enough to end in about a minute, unless others are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanoflow.workloads.options import WorkloadOptions

ON_A_CPU: dict[str, dict[str, Any]] = {
    "offline256": {"num_prompts": 32, "max_input_len": 200, "max_output_len": 200},
    "random": {"num_prompts": 32, "max_input_len": 200, "max_output_len": 200},
    "decode": {"output_len": 65},
    "families": {"num_prompts": 500},
}


def on_a_cpu(options: WorkloadOptions, told: set[str]) -> tuple[WorkloadOptions, str | None]:
    """Options for a CPU, and a sentence about them if they are others than the defaults.

    Args:
        options: as they are set.
        told: keys that the command line sets. One of the sizes among them leaves all as they are.
    """
    sizes = ON_A_CPU.get(options.workload, {})
    virtual = getattr(options, "step_ms", None) is not None  # its time is no real one
    is_set = any(f"bench.{name}" in told or getattr(options, name) != getattr(type(options)(), name) for name in sizes)
    if not sizes or virtual or is_set:
        return options, None
    written = " ".join(f"bench.{name}={value}" for name, value in sizes.items())
    note = f"On a CPU the workload is a small one by default: {written}. Set one of these to choose all sizes yourself."
    return replace(options, **sizes), note
