"""The table of roles: everything that a plugin can serve as.

Hooks, config groups, `--help`, `nanoflow plugins`, templates and the docs follow from it. To add a role, write its
contract (a file in `core/contracts/`) and a row here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from nanoflow.core.config.engine_config import Choice, PluginChoice, SchedulerConfig
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext
from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.contracts.observer import Observer, ObserverContext
from nanoflow.core.contracts.operations import OperationsContext, OperationSet
from nanoflow.core.contracts.scheduler import Scheduler, SchedulerContext

Cardinality = Literal["one", "several", "by_request"]
Promise = Literal["stable", "versioned", "experimental"]


@dataclass(frozen=True)
class Role:
    """One row of the table.

    Attributes:
        name: how configs name it: `scheduler=...`, `LLM(scheduler=...)`.
        hook: the function by which plugins offer components for it.
        product: the contract that a built component fulfils, an ABC.
        context: the dataclass that a component is built from, beside its options.
        default: the plugin, or the plugins, where a config names none.
        cardinality: `one` plugin serves the role (`scheduler=fcfs`); `several` do at once (`observers=[a,b]`, in this
            order, none by default); or all that are installed are there, and each request says which it wants and how
            (`by_request`), so that no config names any.
        options: what the components' option dataclasses derive from.
        promise: how firm the contract is; `nanoflow.plugin` says what the words mean.
    """

    name: str
    hook: str
    product: type
    context: type
    default: str | tuple[str, ...] = ()
    cardinality: Cardinality = "one"
    options: type = object
    promise: Promise = "versioned"

    @property
    def noun(self) -> str:
        """What one of its plugins is called in messages."""
        return self.name if self.cardinality == "one" else self.name.removesuffix("s")

    @property
    def in_config(self) -> bool:
        """Whether configs choose its plugins."""
        return self.cardinality != "by_request"

    @property
    def default_choice(self) -> Choice:
        """The default as a config holds it."""
        if isinstance(self.default, str):
            return PluginChoice(self.default)
        return tuple(PluginChoice(name) for name in self.default)


Roles = Mapping[str, Role]


def table(*rows: Role) -> Roles:
    """The roles by name, in this order."""
    return {row.name: row for row in rows}


def in_config(roles: Roles, *cardinalities: Cardinality) -> list[str]:
    """The names of the roles that are keys of a config; only those of these cardinalities, if any are given."""
    wanted: Iterable[str] = cardinalities or ("one", "several")
    return [role.name for role in roles.values() if role.in_config and role.cardinality in wanted]


ROLES = table(
    Role("model", "nanoflow_models", ModelArch, ModelContext, "auto"),
    Role("attention", "nanoflow_attention_backends", AttentionBackend, AttentionContext, "auto"),
    Role("scheduler", "nanoflow_schedulers", Scheduler, SchedulerContext, "fcfs", options=SchedulerConfig),
    Role("block_manager", "nanoflow_block_managers", BlockManager, BlockManagerContext, "prefix"),
    Role("logits_processors", "nanoflow_logits_processors", LogitsProcessor, LogitsProcessorContext,
         cardinality="by_request"),
    Role("operations", "nanoflow_operations", OperationSet, OperationsContext, (), "several", promise="experimental"),
    Role("observers", "nanoflow_observers", Observer, ObserverContext, cardinality="several"),
)  # fmt: skip
