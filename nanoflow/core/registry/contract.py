"""The version of the contract with plugins, and what each version changed.

The contract is what `nanoflow.plugin`, the hooks and `nanoflow.testing` promise. A plugin says for which version it was
made with a module attribute beside its hooks:

    nanoflow_contract = 1

It grows only when a plugin that kept to the contract before may break; what is merely added changes no version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nanoflow.core.config.errors import PluginError
from nanoflow.core.config.fields import is_int

ATTRIBUTE = "nanoflow_contract"
CONTRACT_VERSION = 1


@dataclass(frozen=True)
class Change:
    """What a version changed for plugins, in one sentence.

    Attributes:
        version: the first one with the change.
        what: the sentence: what is no longer so, and what is in place of it.
        roles: the roles that it concerns; empty for all.
        traces: texts by which the error of a plugin that does not know of the change can be told, such as the name of
            a module that is gone.
    """

    version: int
    what: str
    roles: tuple[str, ...] = ()
    traces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contract:
    """A version, and all changes that led to it.

    Attributes:
        version: the present one.
        undeclared: the one that a plugin was made for if it says nothing: the first that could be declared. It stays
            that when the version grows, or a plugin that says nothing would be taken for up to date for ever.
        changes: by rising version.
    """

    version: int
    changes: tuple[Change, ...]
    undeclared: int = 1

    def check(self, plugin: Any, roles: Iterable[str]) -> None:
        """Raise unless a plugin for these roles can work with this version.

        Raises:
            PluginError: it was made for a later version, or for an earlier one and something that concerns its roles
                has changed since, which the message names; or what it declares is no version.
        """
        declared = getattr(plugin, ATTRIBUTE, self.undeclared)
        if not is_int(declared) or declared < 0:
            raise PluginError(f"{ATTRIBUTE} must be the number of a contract version, got {declared!r}")
        if declared > self.version:
            raise PluginError(
                f"it is made for contract {declared}, and this nanoflow has contract {self.version}; install a newer "
                "nanoflow"
            )
        served = set(roles)
        news = [c for c in self.changes if c.version > declared and (not c.roles or served & set(c.roles))]
        if news:
            raise PluginError(f"it is made for contract {declared}, and this is contract {self.version}. {_told(news)}")

    def explanation(self, error: BaseException) -> str:
        """The changes from which this error of an import follows, as sentences; empty if it follows from none."""
        text = str(error)
        return _told(c for c in self.changes if isinstance(error, ImportError) and any(t in text for t in c.traces))


def _told(changes: Iterable[Change]) -> str:
    return " ".join(f"Contract {change.version}: {change.what}" for change in changes)


CONTRACT = Contract(
    version=CONTRACT_VERSION,
    changes=(
        Change(
            1,
            "plugins import from nanoflow, nanoflow.plugin and nanoflow.testing alone; modules of nanoflow.core and "
            "nanoflow.plugins have moved, and may move again (docs/extension.md lists the names).",
            traces=("nanoflow.core", "nanoflow.plugins"),
        ),
    ),
)
