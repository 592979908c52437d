"""The Triton backend runs the kit's suite in Triton's interpreter; `tests/gpu` runs it on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from nanoflow.plugins.attention.options import interpreted
from nanoflow.plugins.attention.triton import settings as triton_settings
from nanoflow.plugins.attention.triton.prefill import TritonPrefill
from nanoflow.plugins.attention.triton.settings import DecodeSettings, PrefillSettings
from nanoflow.testing import AttentionBackendSuite
from nanoflow.testing.batches import Case, context

pytestmark = pytest.mark.skipif(not interpreted(), reason="Triton compiles for a GPU here")


@pytest.mark.slow
class TestTriton(AttentionBackendSuite):
    component = "triton"
    shapes = [(2, 64, 16), (8, 64, 256), (3, 80, 16), (16, 32, 64)]
    bounds = {torch.float32: 1e-5}  # not bfloat16, of which the interpreter's `tl.dot` multiplies the bit patterns


@pytest.mark.slow
def test_float16() -> None:
    suite = type("Float16", (TestTriton,), {"bounds": {torch.float16: 2e-3}})()
    suite.test_numbers("mixed", (2, 64, 16), torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(("least", "window"), [(0, None), (1, None), (3, None), (0, 50), (3, 50)])
@pytest.mark.parametrize("decodes", [[700], [3] * 5, [1, 300, 1, 90]])
def test_shares_of_any_size(
    decodes: list[int], least: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DecodeSettings(block_n=32, num_warps=4, num_stages=2, waves=4, least=least, projects=True)
    monkeypatch.setattr(triton_settings, "DECODE", ((10**9, settings),))
    c = context(2, 32, 16, num_layers=1, windows=(window,))
    case = Case.draw(np.random.default_rng(0), 16, decodes)
    TestTriton().check(c, case)
    TestTriton().check_projection(c, case, normed=True)


def test_tiles_cover_each_query_once() -> None:
    c = context(2, 32, 16)
    case = Case.draw(np.random.default_rng(0), 16, [9, 4], [(70, 30), (2, 48), (33, 0)])
    prefiller = TritonPrefill(c, PrefillSettings(block_m=32, block_n=16, num_warps=4, num_stages=2))
    for beside_decodes, expected in ((True, range(2, 107)), (False, range(107))):
        tiles = prefiller.tiles(case.inputs(16), beside_decodes=beside_decodes).tolist()
        covered = [place for _, first, count, _ in tiles for place in range(first, first + count)]
        assert sorted(covered) == list(expected)
        for seq, first, count, seen in tiles:
            if count:
                start = case.query_lens[:seq].sum()
                assert seen == case.context_lens[seq] - case.query_lens[seq] + (first - start) + 1
