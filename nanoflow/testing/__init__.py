"""The conformance kit: one suite a role, which a plugin's author subclasses and runs with pytest.

    from nanoflow.testing import SchedulerSuite

    class TestSJF(SchedulerSuite):
        component = "sjf"

`component` is the registered name of an installed plugin, or the `Component` itself; `options` are values for its
config dataclass. Block managers without a prefix cache set `shares_prefixes = False`. Models give `hf_configs`: tiny
configs by name, each with the `model_type` by which transformers finds its own model.

    class TestGPT2(ModelArchSuite):
        component = "gpt2"
        hf_configs = {"tiny": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}}

A role that has no suite of its own is tested with `ComponentSuite`, which is told the `role`.

A check that a plugin fails on purpose is a method `test_*` to override, so that it shows. What else a subclass may set
is in each suite's docstring, and `docs/testing.md` says more. It needs pytest and hypothesis:
`pip install nanoflow-engine[testing]`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    pytest.register_assert_rewrite(_module.name)  # so that a failed check shows its values

_SUITES = {
    "ComponentSuite": "nanoflow.testing.component",
    "SchedulerSuite": "nanoflow.testing.schedulers",
    "BlockManagerSuite": "nanoflow.testing.block_managers",
    "AttentionBackendSuite": "nanoflow.testing.attention",
    "ModelArchSuite": "nanoflow.testing.models",
    "LogitsProcessorSuite": "nanoflow.testing.logits_processors",
}
__all__ = list(_SUITES)

if TYPE_CHECKING:
    from nanoflow.testing.attention import AttentionBackendSuite
    from nanoflow.testing.block_managers import BlockManagerSuite
    from nanoflow.testing.component import ComponentSuite
    from nanoflow.testing.logits_processors import LogitsProcessorSuite
    from nanoflow.testing.models import ModelArchSuite
    from nanoflow.testing.schedulers import SchedulerSuite


def __getattr__(name: str) -> Any:
    if name not in _SUITES:
        raise AttributeError(f"module 'nanoflow.testing' has no attribute {name!r}")
    value = getattr(import_module(_SUITES[name]), name)
    globals()[name] = value
    return value
