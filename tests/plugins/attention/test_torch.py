"""The PyTorch backend runs the kit's suite; and how it groups sequences."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.plugins.attention.torch.backend import PADDING_TOKENS, similar
from nanoflow.testing import AttentionBackendSuite


class TestTorch(AttentionBackendSuite):
    component = "torch"


class TestReference(AttentionBackendSuite):
    component = "torch"
    options: ClassVar[dict[str, Any]] = {"group": False}


@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 1, 2, 7]), st.integers(0, 3000)), min_size=1, max_size=60),
    max_tokens=st.integers(1, 20_000),
)
def test_grouping(rows: list[tuple[int, int]], max_tokens: int) -> None:
    query_lens = np.array([new for new, _ in rows])
    context_lens = query_lens + np.array([past for _, past in rows])
    groups = similar(query_lens, context_lens, max_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(rows))), "each sequence is in exactly one group"
    for group in groups:
        longest = context_lens[group].max()
        assert len(set(query_lens[group].tolist())) == 1
        assert longest * len(group) - context_lens[group].sum() <= PADDING_TOKENS
        assert len(group) == 1 or longest * len(group) <= max_tokens


def test_equal_lengths_make_one_group() -> None:
    (group,) = similar(np.full(200, 1), np.full(200, 50), 10**6)
    assert sorted(group.tolist()) == list(range(200))
    assert len(similar(np.full(200, 1), np.full(200, 50), 50 * 50)) == 4
