"""All that plugins import, beside `nanoflow` and `nanoflow.testing`: contracts, contexts, options, errors, layers.

Everything else in nanoflow may move. Each name has a promise, which `docs/extension.md` explains:

- stable: stays as it is;
- versioned: if it changes so that a plugin may break, the version of the contract grows, and who declares an older one
  is told what changed;
- experimental: may change with any release.

Names are imported on first use, so that a plugin's `__init__.py` costs no torch. Layers do load it: import those, as
torch itself, in a module that `Component.build` imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanoflow.core.registry.roles import ROLES

_NAMED = {
    "stable": {
        "hookimpl": "nanoflow.core.registry.hookspecs",
        "Component": "nanoflow.core.registry.component",
        "NoOptions": "nanoflow.core.registry.component",
        "CONTRACT_VERSION": "nanoflow.core.registry.contract",
        "option": "nanoflow.core.config.fields",
        "require": "nanoflow.core.config.fields",
        "is_int": "nanoflow.core.config.fields",
        "is_number": "nanoflow.core.config.fields",
        "NanoflowError": "nanoflow.core.config.errors",
        "ConfigError": "nanoflow.core.config.errors",
        "CheckpointError": "nanoflow.core.config.errors",
        "PluginError": "nanoflow.core.config.errors",
        "RequestError": "nanoflow.core.config.errors",
        "SamplingParams": "nanoflow.core.config.sampling_params",
    },
    "versioned": {
        "ContinuousScheduler": "nanoflow.core.contracts.continuous_scheduler",
        "Place": "nanoflow.core.contracts.waiting_line",
        "SchedulerConfig": "nanoflow.core.config.engine_config",
        "Sequence": "nanoflow.core.data.sequence",
        "Batch": "nanoflow.core.data.batch",
        "PreemptCause": "nanoflow.core.data.reasons",
        "PreemptReason": "nanoflow.core.data.reasons",
        "WaitCause": "nanoflow.core.data.reasons",
        "WaitReason": "nanoflow.core.data.reasons",
        "AttentionInput": "nanoflow.core.data.attention_input",
        "ParallelContext": "nanoflow.core.data.parallel",
        "LogitsRows": "nanoflow.core.contracts.logits_processor",
        "Constraint": "nanoflow.core.data.constraint",
        "to_device": "nanoflow.core.data.transfer",
        "Shard": "nanoflow.core.data.parallel",
        "Share": "nanoflow.core.data.parallel",
        "Attention": "nanoflow.core.layers",
        "ColumnParallelLinear": "nanoflow.core.layers",
        "Decoder": "nanoflow.core.layers",
        "DecoderLayer": "nanoflow.core.layers",
        "Embedding": "nanoflow.core.layers",
        "FeedForward": "nanoflow.core.layers",
        "GatedLinear": "nanoflow.core.layers",
        "Linear": "nanoflow.core.layers",
        "QKVLinear": "nanoflow.core.layers",
        "RMSNorm": "nanoflow.core.layers",
        "RotaryEmbedding": "nanoflow.core.layers",
        "RowParallelLinear": "nanoflow.core.layers",
    },
    "experimental": {
        "Projection": "nanoflow.core.data.attention_input",
        "RankPartials": "nanoflow.core.data.parallel",
        "Experts": "nanoflow.core.layers",
        "Operation": "nanoflow.core.ops",
        "Ops": "nanoflow.core.ops",
        "Rotation": "nanoflow.core.layers",
        "add_partials": "nanoflow.core.layers",
        "apply_rotary": "nanoflow.core.layers",
        "attend": "nanoflow.core.layers",
    },
}


def _of_roles(promise: str) -> dict[str, str]:
    """The contracts of the roles with this promise, and what their components are built from."""
    classes = [item for role in ROLES.values() if role.promise == promise for item in (role.product, role.context)]
    return {item.__name__: item.__module__ for item in classes}


PROMISES = {promise: names | _of_roles(promise) for promise, names in _NAMED.items()}
_MODULES = {name: module for names in PROMISES.values() for name, module in names.items()}
__all__ = list(_MODULES)

if TYPE_CHECKING:
    from nanoflow.core.config.engine_config import SchedulerConfig
    from nanoflow.core.config.errors import CheckpointError, ConfigError, NanoflowError, PluginError, RequestError
    from nanoflow.core.config.fields import is_int, is_number, option, require
    from nanoflow.core.config.sampling_params import SamplingParams
    from nanoflow.core.contracts import *
    from nanoflow.core.data.attention_input import AttentionInput, Projection
    from nanoflow.core.data.batch import Batch
    from nanoflow.core.data.constraint import Constraint
    from nanoflow.core.data.parallel import ParallelContext, RankPartials, Shard, Share
    from nanoflow.core.data.reasons import PreemptCause, PreemptReason, WaitCause, WaitReason
    from nanoflow.core.data.sequence import Sequence
    from nanoflow.core.data.transfer import to_device
    from nanoflow.core.layers import *
    from nanoflow.core.ops import Operation, Ops
    from nanoflow.core.registry.component import Component, NoOptions
    from nanoflow.core.registry.contract import CONTRACT_VERSION
    from nanoflow.core.registry.hookspecs import hookimpl


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nanoflow.plugin' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
