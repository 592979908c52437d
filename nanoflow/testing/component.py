"""What every component must do, whatever its role."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

from nanoflow.testing.suite import Suite


class ComponentSuite(Suite):
    """The description that a plugin gives of itself. For roles that have no suite of their own.

    Attributes:
        role: the name of the role.
    """

    role: ClassVar[str]

    def test_every_option_has_a_help_line(self) -> None:
        component, _ = self.plugin()
        for item in fields(component.config):
            text = item.metadata.get("help")
            assert text, f"{item.name} has no help line; make it with nanoflow.plugin.option"
            assert "\n" not in text, f"the help of {item.name} is more than a line"

    def test_it_says_whether_it_can_be_used_here(self) -> None:
        component, _ = self.plugin()
        assert component.available() is None
        assert component.build is not None
