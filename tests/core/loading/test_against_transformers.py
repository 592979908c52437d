"""Odd checkpoints, drawn at random: the tokens that transformers gives, or a refusal where it gives none.

All of them: `pytest tests/core/loading/test_against_transformers.py`; `-m "not slow"` takes the first sixty.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nanoflow import LLM
from nanoflow.core.config.errors import NanoflowError
from nanoflow.testing.checkpoints import CLEAR_LEAD, generate, make_checkpoint
from tests.core.loading.odd_checkpoints import POSITIONS, Case, draw_case
from tests.core.running import greedy

NUM_QUICK, NUM_ALL, PART = 60, 420, 30
NUM_TOKENS = 6
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
PROMPTS = [[(7 * i * i + length * i + 11) % 63 + 1 for i in range(length)] for length in (30, 41)]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


class Good:
    """Good checkpoints, made once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Path] = {}

    def __call__(self, config: dict[str, Any]) -> Path:
        name = repr(sorted(config.items()))
        if name not in self.made:
            self.made[name] = make_checkpoint(self.folder / str(len(self.made)), TINY | config, seed=len(self.made))
        return self.made[name]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


def theirs(folder: Path) -> list[tuple[list[int], float]] | str:
    """transformers' tokens, each prompt's with its least lead; or why there are none."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            return f"missing: {sorted(map(str, info['missing_keys']))[:2]}"  # they are random
        return [generate(model.eval(), prompt, NUM_TOKENS) for prompt in PROMPTS]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def ours(folder: Path) -> list[list[int]] | str:
    """nanoflow's tokens, or its sentence."""
    try:
        with LLM(str(folder), dtype="float32", num_kv_blocks=16) as llm:
            outputs = llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False)
    except NanoflowError as error:
        return str(error)
    return [output.outputs[0].token_ids for output in outputs]


def differences(number: int, good: Good, tmp_path: Path) -> tuple[str | None, bool]:
    """What is wrong with a case; and whether it was served."""
    case = draw_case(random.Random(number))
    source = good(case.config)
    expected = "refused" if case.is_refused else theirs(case.make(source, tmp_path / "theirs", oracle=True))
    got = ours(case.make(source, tmp_path / "ours", oracle=False))
    return _compare(number, case, got, expected), not isinstance(got, str)


def _compare(number: int, case: Case, got: Any, expected: Any) -> str | None:
    about = f"case {number}, {case}"
    if isinstance(got, str):
        if not (got.endswith((".", "?")) and "\n" not in got and 4 < len(got.split()) < 80 and len(got) < 900):
            return f"{about}: no sentence: {got}"
        if "could not be built" in got or "object at 0x" in got:
            return f"{about}: blames the plugin: {got}"
        return None if isinstance(expected, str) else f"{about}: refused ({got}), but transformers serves it"
    if isinstance(expected, str):
        return f"{about}: served, but {expected[:300]}"
    for tokens, (right, lead) in zip(got, expected, strict=True):
        if lead > CLEAR_LEAD and tokens != right:
            return f"{about}: {tokens} is not {right}"
    return None


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=[pytest.mark.slow] if first >= NUM_QUICK else []) for first in range(0, NUM_ALL, PART)],
)
def test_odd_checkpoints(first: int, good: Good, tmp_path: Path) -> None:
    wrong, num_served = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(first, first + PART):
            difference, served = differences(number, good, tmp_path / str(number))
            wrong += [] if difference is None else [difference]
            num_served += served
    assert not wrong, "\n".join(wrong)
    assert PART // 4 < num_served < PART  # both ends are tried
