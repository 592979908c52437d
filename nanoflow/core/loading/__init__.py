"""Checkpoints: where they lie, and how their weights get into parameters."""

from nanoflow.core.loading.dummy import fill_random
from nanoflow.core.loading.hf_config import read_config
from nanoflow.core.loading.hub import resolve
from nanoflow.core.loading.safetensors import load_weights

__all__ = [
    "fill_random",
    "load_weights",
    "read_config",
    "resolve",
]
