"""Tests that need a GPU; without one they skip themselves."""

from __future__ import annotations

import pytest
import torch

from tests.core.checkpoints import Oracle


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = __file__.rpartition("/")[0]
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """No TF32, which rounds products to 10 bits. It is PyTorch's default; nothing else may have changed it."""
    assert torch.get_float32_matmul_precision() == "highest"
