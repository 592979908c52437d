"""Which function an operation is, by device and by who registers it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from nanoflow.core.config.errors import PluginError
from nanoflow.core.kernels.register import KERNELS, select_ops
from nanoflow.core.ops import Operation, Ops
from nanoflow.core.ops.table import FUSED_FROM
from tests.core.sentences import raises_sentence

CPU, GPU = torch.device("cpu"), torch.device("cuda", 3)
NAMES = [field.name for field in fields(Ops)]


def make(name: str) -> Callable[..., str]:
    return lambda *_, **__: name


def operation(name: str, device_type: str = "cpu", who: str = "theirs") -> Operation:
    return Operation(name, device_type, make(who))


def test_plain_pytorch_where_nothing_is_registered() -> None:
    assert select_ops(CPU) == Ops()
    assert select_ops(GPU, accelerate=False, extra=[operation("linear", "cuda")]) == Ops()


def test_registered_for_a_device_and_replaced_by_a_package() -> None:
    own = [operation("linear", who="own"), operation("rms_norm", who="own"), operation("sample", "cuda", "own")]
    ops = Ops.select(CPU, own, [operation("linear"), operation("embedding", "mps")])
    assert (ops.linear(), ops.rms_norm()) == ("theirs", "own")
    assert (ops.sample, ops.embedding) == (Ops().sample, Ops().embedding)
    with pytest.raises(FrozenInstanceError):
        ops.linear = make("later")  # type: ignore[misc]


def test_a_name_is_imported_when_it_is_chosen() -> None:
    nowhere = Operation("linear", "cuda", "no.such.module:linear")
    there = Operation("rms_norm", "cpu", "torch.nn.functional:rms_norm")
    assert Ops.select(CPU, extra=[nowhere, there]).rms_norm is torch.nn.functional.rms_norm


@pytest.mark.parametrize(("fused", "parts"), FUSED_FROM.items())
def test_a_fused_operation_gives_way_to_one_that_it_would_hide(fused: str, parts: tuple[str, ...]) -> None:
    own = [operation(fused, who="own")]
    for part in parts:
        assert getattr(Ops.select(CPU, own, [operation(part, "cuda")]), fused)() == "own"
        assert getattr(Ops.select(CPU, own, [operation(part)]), fused) is getattr(Ops(), fused)
        assert getattr(Ops.select(CPU, own, [operation(part), operation(fused)]), fused)() == "theirs"


def test_what_can_not_be_replaced() -> None:
    with raises_sentence(PluginError, "There is no operation 'linaer' to replace; there are: linear, norm_linear"):
        Ops.select(CPU, extra=[operation("linaer", "cuda")])
    with raises_sentence(PluginError, "Two plugins replace the operation 'linear' on cpu"):
        Ops.select(CPU, extra=[operation("linear"), operation("linear")])


def test_kernels_take_what_plain_pytorch_takes() -> None:
    """The same arguments by position and by name; a kernel may have further ones."""
    pytest.importorskip("triton")
    assert [kernel.name for kernel in KERNELS] == [name for name in NAMES if name != "norm_rotate"]
    for kernel in KERNELS:
        plain = list(inspect.signature(getattr(Ops(), kernel.name)).parameters.values())
        own = list(inspect.signature(kernel.load()).parameters.values())
        assert [p.kind for p in own[: len(plain)]] == [p.kind for p in plain], kernel.name
        assert [p.default for p in own[: len(plain)]] == [p.default for p in plain], kernel.name
        assert all(p.default is not p.empty for p in own[len(plain) :]), kernel.name
        by_name = [p.name for p in plain if p.kind is p.KEYWORD_ONLY]
        assert [p.name for p in own if p.name in by_name] == by_name, kernel.name


def test_the_table_costs_no_triton() -> None:
    code = "import sys, nanoflow.core.kernels.register; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
