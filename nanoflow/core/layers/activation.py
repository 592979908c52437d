"""Which activation a checkpoint asks for."""

from __future__ import annotations

from typing import Any

from nanoflow.core.config.errors import CheckpointError, shown

NAMES = ("silu", "swish")  # two of one


def require_silu(hf_config: dict[str, Any]) -> None:
    """For feed-forward layers that have no other activation.

    Raises:
        CheckpointError: config.json asks for another activation than SiLU.
    """
    wanted = hf_config.get("hidden_act", "silu")
    if wanted not in NAMES:
        raise CheckpointError(f"The checkpoint's hidden_act is {shown(wanted):.60}; 'silu' is what is served.")
