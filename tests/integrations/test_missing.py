"""Without the program that it is for, an integration says what to install."""

from __future__ import annotations

import runpy
import sys

import pytest


@pytest.mark.parametrize(("name", "error"), [("__main__", SystemExit), ("other", ImportError)])
def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "nanoflow.integrations.lm_eval", raising=False)
    with pytest.raises(error, match=r"pip install 'nanoflow-engine\[eval\]'"):
        runpy.run_module("nanoflow.integrations.lm_eval", run_name=name)
