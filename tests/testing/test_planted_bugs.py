"""The kit catches what it is there to catch: each planted bug fails the check that is meant for it."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.testing import (
    AttentionBackendSuite,
    BlockManagerSuite,
    LogitsProcessorSuite,
    ModelArchSuite,
    SchedulerSuite,
)
from nanoflow.testing.loads import drive
from nanoflow.testing.models import Oracles
from nanoflow.testing.suite import Suite
from tests.plugins.logits_processors.at_most import AtMost, Newest
from tests.testing import planted

CONFIG = {
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


def run(suite: type[Suite], bug: type, test: str, **arguments: Any) -> None:
    """One test of the suite, on a broken plugin."""
    broken = type("Broken", (suite,), {"component": planted.component(bug), "patience": 300, "num_steps": 3000})
    getattr(broken(), test)(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "test", "arguments", "words"),
    [
        (planted.LeaksOnAbort, "test_random_loads", {"manager": "plain", "depth": 0}, "was aborted and keeps blocks"),
        (planted.LeaksOnAbort, "test_any_calls", {"manager": "prefix"}, r"free and \d+ held of|keeps blocks"),
        (planted.LosesABlockOnPreemption, "test_random_loads", {"manager": "plain", "depth": 1}, "free and .* held of"),
        (planted.ShortestFirst, "test_nobody_starves", {"size": "roomy", "manager": "plain", "depth": 0},
         r"Sequence\('r\d+', prompt=30.* has not ended after 300 steps"),
        (planted.OverBudget, "test_random_loads", {"manager": "plain", "depth": 0}, "more than the budget of"),
        (planted.TooMany, "test_random_loads", {"manager": "plain", "depth": 0}, "sequences are more than"),
        (planted.ChunksFirst, "test_random_loads", {"manager": "plain", "depth": 1}, "must come before the others"),
        (planted.HidesPreemptions, "test_random_loads", {"manager": "prefix", "depth": 1}, "Batch.preempted is not"),
        (planted.LooksAtValues, "test_values_of_tokens_do_not_matter", {}, None),
        (planted.EndsTwice, "test_a_lone_request", {"manager": "plain"}, "update returned a sequence twice"),
        (planted.BlamesTheBudget, "test_random_loads", {"manager": "plain", "depth": 0}, "NO_BUDGET.* is not true"),
        (planted.MiscountsTheLine, "test_random_loads", {"manager": "plain", "depth": 1}, "and [0-9]+ others wait"),
        (planted.BlamesTheVictim, "test_random_loads", {"manager": "prefix", "depth": 1}, "no such refusal of blocks"),
        (planted.Stalls, "test_a_lone_request", {"manager": "plain"}, "nothing runs, though 1 requests are unfinished"),
    ],
)  # fmt: skip
def test_schedulers(bug: type, test: str, arguments: dict[str, Any], words: str | None) -> None:
    with pytest.raises(AssertionError, match=words):
        run(SchedulerSuite, bug, test, **arguments)


@pytest.mark.parametrize(
    ("bug", "test", "arguments", "words"),
    [
        (planted.LeaksABlock, "test_random_loads", {"depth": 0}, "free and .* held of"),
        (planted.LeaksABlock, "test_blocks_for_tokens", {"block_size": 2}, None),
        (planted.OneTokenShort, "test_blocks_for_tokens", {"block_size": 4}, "tokens in blocks of 4"),
        (planted.HandsOutTwice, "test_no_block_has_two_owners", {"block_size": 1}, None),
        (planted.TrustsDigests, "test_collisions_never_mix_prompts", {"depth": 0}, "reads what is not its own"),
        (planted.SkipsTheLastToken, "test_tokens_whose_logits_are_needed_are_computed", {}, None),
        (planted.KeepsWhatItRefused, "test_a_refusal_changes_nothing", {}, None),
        (planted.ForgetsIdleBlocks, "test_every_free_block_can_be_had", {"block_size": 2}, None),
        (planted.PromisesTooMuch, "test_match_is_what_allocate_takes", {}, None),
        (planted.IgnoresIdentities, "test_identities_share_nothing", {}, None),
        (planted.IgnoresIdentities, "test_random_loads", {"depth": 0}, "reads what is not its own"),
        (planted.LooksUpAgain, "test_a_waiting_sequence_is_not_looked_up_again", {}, "calls with 40 blocks and"),
        (planted.EvictsSilently, "test_every_eviction_is_told_once", {}, "after allocate"),
        (planted.TellsOfEveryFree, "test_every_eviction_is_told_once", {}, "after commit and free"),
        (planted.NeverFinds, "test_full_blocks_are_found", {}, None),
    ],
)
def test_block_managers(bug: type, test: str, arguments: dict[str, Any], words: str | None) -> None:
    with pytest.raises(AssertionError, match=words):
        run(BlockManagerSuite, bug, test, **arguments)


NUMBERS = {"mix": "mixed", "shape": (2, 64, 16), "dtype": torch.float32}


@pytest.mark.parametrize(
    ("bug", "test", "arguments", "words"),
    [
        (planted.SlotOffByOne, "test_numbers", NUMBERS, "forward must write the new tokens' slots and no others"),
        (planted.MissesTheNewest, "test_numbers", NUMBERS, "off by"),
        (planted.ReadsWholeBlocks, "test_numbers", NUMBERS, "off by"),
        (planted.MixesUpKVHeads, "test_numbers", NUMBERS, "off by"),
        (planted.OwnScale, "test_scale", {}, "off by"),
        (planted.NoWindows, "test_windows", {"window": 16}, "off by"),
        (planted.OneCacheForAll, "test_the_cache_takes_what_it_says", {"dtype": torch.float32}, "views overlap"),
        (planted.Drifts, "test_the_same_again", {"mix": "decodes"}, None),
        (planted.LeavesRowsOut, "test_numbers", NUMBERS, "off by"),
    ],
)
def test_attention_backends(bug: type, test: str, arguments: dict[str, Any], words: str | None) -> None:
    with pytest.raises(AssertionError, match=words):
        run(AttentionBackendSuite, bug, test, **arguments)


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    return Oracles(tmp_path_factory.mktemp("checkpoints"), {"tiny": CONFIG})


@pytest.mark.parametrize(
    ("bug", "test", "arguments", "words"),
    [
        (planted.WrongRope, "test_logits", {"chunk": 128, "device": "cpu"}, "of 17 tokens are off by"),
        (planted.WrongRope, "test_tokens", {"num_kv_blocks": 256, "overlap": False, "device": "cpu"}, None),
        (planted.WrongEps, "test_logits", {"chunk": 128, "device": "cpu"}, "are off by"),
        (planted.RestartsPositions, "test_logits", {"chunk": 5, "device": "cpu"}, "are off by"),
        (planted.AlwaysTheFirstCache, "test_attention_is_called_once_a_layer", {}, None),
        (planted.ForgetsAWeight, "test_every_parameter_is_loaded", {}, "has no place for .*q_norm"),
        (planted.LoadsIntoACopy, "test_every_parameter_is_loaded", {}, "not loaded: .*o_proj"),
        (planted.AddsNothingUp, "test_split_over_ranks", {}, "a rank's logits are off by"),
    ],
)
def test_models(bug: type, test: str, arguments: dict[str, Any], words: str | None, oracles: Oracles) -> None:
    with pytest.raises(AssertionError, match=words):
        run(ModelArchSuite, bug, test, name="tiny", oracles=oracles, **arguments)


ONCE = {
    "once": {"logits_processors": {"broken": {"times": 1}}},
    "late": {"logits_processors": {"broken": {"times": 1, "after": 12}}},
    "twice": {"logits_processors": {"broken": {"times": 2}}},
}


@pytest.mark.parametrize(
    ("bug", "test", "arguments", "words"),
    [
        (planted.ByRow, "test_batches", {}, "other logits than alone"),
        (planted.CountsForAll, "test_batches", {}, "other logits than alone"),
        (planted.LeavesCountsBehind, "test_a_slot_used_again", {}, "other logits than alone"),
        (planted.ForgetsOnPreemption, "test_preemption", {}, "other logits than alone"),
        (planted.DoesNotWait, "test_steps_overlap", {}, "other logits than alone"),
        (planted.CountsInApply, "test_rows_of_others", {"dtype": torch.float32}, "apply gives something else"),
        (planted.ChangesAllRows, "test_rows_of_others", {"dtype": torch.float32}, "rows of others were changed"),
        (planted.ChangesWhatIsNotItsOwn, "test_rows_of_others", {"dtype": torch.bfloat16}, "apply must leave alone"),
        (planted.TakesAnything, "test_refused", {}, "none was not refused"),
        (planted.DoesNothing, "test_something_is_changed", {}, "no logits are changed by"),
        (planted.Raises, "test_batches", {}, "'broken' failed .ZeroDivisionError"),
        (planted.LeavesCountsBehind, "test_in_an_engine", {}, "other tokens with"),
        (planted.ForgetsOnPreemption, "test_in_an_engine", {}, "other tokens with"),
    ],
)
def test_logits_processors(bug: type, test: str, arguments: dict[str, Any], words: str) -> None:
    attributes = {"requests": ONCE, "refused": {"none": {"logits_processors": {"broken": {}}}}, "vocab_size": 60}
    suite = type("Broken", (LogitsProcessorSuite,), {"component": planted.component(bug), **attributes})
    suite.setup_class()
    with pytest.raises(AssertionError, match=words):
        getattr(suite(), test)(**arguments)


@pytest.mark.parametrize("sound", [AtMost, Newest])
def test_a_sound_logits_processor(sound: type) -> None:
    suite = type("Sound", (LogitsProcessorSuite,), {"component": planted.component(sound), "requests": ONCE})
    suite.vocab_size = 60
    suite.setup_class()
    for test in ("something_is_changed", "batches", "steps_overlap", "preemption", "a_slot_used_again", "in_an_engine"):
        getattr(suite(), f"test_{test}")()
    suite().test_rows_of_others(torch.bfloat16)


@pytest.mark.slow
def test_what_an_author_sees(tmp_path: Path) -> None:
    """A suite in a file of one's own: the sound plugin passes, the broken one fails with a sentence that says why."""
    (tmp_path / "test_mine.py").write_text(
        "from nanoflow.testing import SchedulerSuite\n"
        "from tests.testing import planted\n\n\n"
        "class TestSound(SchedulerSuite):\n"
        "    component = 'fcfs'\n\n\n"
        "class TestBroken(SchedulerSuite):\n"
        "    component = planted.component(planted.LeaksOnAbort)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "nothing_to_do or abort_in_flight"]
    process = subprocess.run(
        [*command, str(tmp_path / "test_mine.py")], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert re.search(r"AssertionError: Sequence\('r0'.* was aborted and keeps blocks", process.stdout)
    assert "FAILED" in process.stdout
    assert "TestSound" not in process.stdout


def test_a_suite_without_a_component_says_so() -> None:
    with pytest.raises(AssertionError, match="TestMine needs an attribute `component`"):
        type("TestMine", (SchedulerSuite,), {})().test_nothing_to_do()


@pytest.mark.parametrize("depth", [0, 1])
def test_the_loads_bring_everything_about(depth: int) -> None:
    """A check that is never reached catches nothing."""
    suite = type("FCFS", (SchedulerSuite,), {"component": "fcfs"})
    counts: Counter[str] = drive(suite.maker("prefix"), random.Random(depth), depth, 5_000)
    assert min(counts[what] for what in ("preemptions", "aborts", "ends", "mixed", "chunks", "hits")) > 50
