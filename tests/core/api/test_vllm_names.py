"""What users of vLLM, nano-vLLM and transformers write first works, or is told in a sentence."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import nanoflow
from nanoflow import LLM, AsyncLLM, SamplingParams, TextPrompt, TokensPrompt
from nanoflow.core.api.options import config_from_options
from nanoflow.core.api.vllm_options import SPELLINGS, VLLM_OPTIONS, Ignored, Renamed, Unsupported
from nanoflow.core.config.engine_config import Config, EngineConfig
from nanoflow.core.config.errors import CheckpointError, ConfigError, PluginError, RequestError
from nanoflow.core.config.fields import field_names
from nanoflow.core.loading.hub import bundled
from nanoflow.core.registry.registry import Registry
from tests.core.running import greedy, tokens
from tests.core.sentences import raises_sentence

DOC = Path(__file__).parents[3] / "docs" / "from-vllm.md"
REGISTRY = Registry.load()
BARD = bundled()["bard"]


def config(checkpoint: Any = None, **options: Any) -> Config:
    """The config of these keywords, which bring no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return config_from_options(REGISTRY, checkpoint, options)


def named(fate: type) -> list[str]:
    return [name for name, row in VLLM_OPTIONS.items() if isinstance(row, fate)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(num_kv_blocks=64) as llm:
        yield llm


# The checkpoint


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", str(BARD), BARD, "./nowhere", "/nowhere"])
def test_model_names_a_checkpoint(model: Any) -> None:
    found = config(model=model)
    assert (found.checkpoint, found.plugins["model"].name) == (str(model), "auto")


def test_model_names_a_folder_without_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "llama"):
        (tmp_path / name).mkdir()
    assert config(model="mine").checkpoint == "mine"
    assert config(model="llama").plugins["model"].name == "llama"  # a plugin's name stays the plugin


def test_model_names_a_plugin() -> None:
    found = config("a/b", model="llama")
    assert (found.checkpoint, found.plugins["model"].name) == ("a/b", "llama")
    with raises_sentence(PluginError, "There is no model called 'lama'", "Did you mean 'llama'?"):
        config(model="lama")


@pytest.mark.parametrize("start", [LLM, AsyncLLM])
def test_two_checkpoints_are_refused(start: Any) -> None:
    with raises_sentence(ConfigError, f"{start.__name__}() got two checkpoints, 'a/b' and model='c/d'; give one"):
        start("a/b", model="c/d")
    with raises_sentence(CheckpointError, "Checkpoint 'no-such/model'"):
        start(model="no-such/model")


@pytest.mark.parametrize("checkpoint", [5, b"a/b", True, ["a/b"], np.array([1])])
def test_what_is_no_checkpoint(checkpoint: Any) -> None:
    with raises_sentence(ConfigError, "must be a folder or a Hub id"):
        config(checkpoint)


def test_first_lines_of_vllm() -> None:
    with LLM(model=str(BARD), tokenizer=str(BARD), num_kv_blocks=64) as llm:
        assert llm.get_tokenizer().encode("HAMLET:")
        assert len(llm.generate(TextPrompt(prompt="HAMLET:"), SamplingParams(max_tokens=2), use_tqdm=False)) == 1


def test_another_tokenizer(tmp_path: Path) -> None:
    with raises_sentence(CheckpointError, "There is no tokenizer in", "which engine.tokenizer names"):
        LLM(tokenizer=str(tmp_path))
    with raises_sentence(CheckpointError, "Checkpoint 'no-such/tokenizer'"):
        LLM(tokenizer="no-such/tokenizer")


def test_revision() -> None:
    with raises_sentence(CheckpointError, "is a folder, which has no revision 'v1'"):
        LLM(revision="v1")
    with raises_sentence(CheckpointError, "Checkpoint 'no-such/model'", "its revision 'v1'"):
        LLM("no-such/model", revision="v1")


def test_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with raises_sentence(CheckpointError, "could not be had from the Hub"):
        LLM("some/model", revision="v1")
    assert (asked["repository"], asked["revision"]) == ("some/model", "v1")


# Options


@pytest.mark.parametrize(
    ("name", "value", "role", "expected"),
    [
        ("enable_prefix_caching", True, "block_manager", "prefix"),
        ("enable_prefix_caching", False, "block_manager", "plain"),
        ("enable_prefix_caching", None, "block_manager", "prefix"),
        ("scheduling_policy", "priority", "scheduler", "priority"),
        ("attention_backend", "FLASH_ATTN", "attention", "flash"),
        ("attention_backend", "torch", "attention", "torch"),
        ("attention_backend", None, "attention", "auto"),
    ],
)
def test_names_of_plugins(name: str, value: Any, role: str, expected: str) -> None:
    assert config(**{name: value}).plugins[role].name == expected


@pytest.mark.parametrize(
    ("name", "value", "here", "expected"),
    [
        ("num_gpu_blocks_override", 100, "num_kv_blocks", 100),
        ("num_gpu_blocks_override", None, "num_kv_blocks", None),
        ("num_kvcache_blocks", -1, "num_kv_blocks", None),
        ("kvcache_block_size", 256, "block_size", 256),
        ("kv_cache_memory_bytes", 2**29, "kv_cache_gib", 0.5),
        ("async_scheduling", True, "overlap", True),
        ("cudagraph_capture_sizes", [1, 2], "graph_sizes", [1, 2]),
        ("dtype", "half", "dtype", "float16"),
        ("dtype", "float", "dtype", "float32"),
        ("dtype", "bf16", "dtype", "bfloat16"),
        ("dtype", torch.bfloat16, "dtype", "bfloat16"),
        ("dtype", "bfloat16", "dtype", "bfloat16"),
        ("generation_config", "vllm", "generation_config", "none"),
        ("load_format", "safetensors", "load_format", "auto"),
        ("seed", None, "seed", 0),
        ("seed", np.int64(3), "seed", 3),
        ("max_model_len", np.int32(64), "max_model_len", 64),
    ],
)
def test_names_and_values_of_the_engine(name: str, value: Any, here: str, expected: Any) -> None:
    assert getattr(config(**{name: value}).engine, here) == expected


def test_max_num_batched_tokens() -> None:
    found = config(max_num_batched_tokens=512, max_num_seqs=64, enforce_eager=True, tensor_parallel_size=1)
    assert found.plugins["scheduler"].options == {"max_num_batched_tokens": 512, "max_num_seqs": 64}


@pytest.mark.parametrize("name", named(Renamed))
def test_both_names_of_one_option(name: str) -> None:
    here = VLLM_OPTIONS[name].name
    with raises_sentence(ConfigError, f"got {name} and {here}, which are one here; give {here} alone"):
        config(**{name: 1, here: {"block_manager": "prefix", "attention": "torch", "scheduler": "fcfs"}.get(here, 1)})


def test_wrong_values_of_renamed_options() -> None:
    with raises_sentence(ConfigError, "engine.kv_cache_gib must be a number > 0 or null, got 'much'."):
        config(kv_cache_memory_bytes="much")
    with raises_sentence(PluginError, "There is no block_manager called 'yes'"):
        config(enable_prefix_caching="yes")


@pytest.mark.parametrize("name", named(Ignored))
def test_harmless_options_are_ignored_with_a_warning(name: str) -> None:
    row = VLLM_OPTIONS[name]
    with pytest.warns(UserWarning, match=rf"LLM\({name}=...\) is ignored: ") as caught:
        found = config_from_options(REGISTRY, None, {name: "something"})
    assert found == config()
    assert str(caught[0].message).endswith(".")
    for value in row.unset:
        assert config(**{name: value}) == config()


@pytest.mark.parametrize("name", named(Unsupported))
def test_what_is_not_there_is_not_supported(name: str) -> None:
    with raises_sentence(ConfigError, f"LLM({name}='something') is not supported: ", VLLM_OPTIONS[name].instead):
        config(**{name: "something"})
    for value in VLLM_OPTIONS[name].unset:
        assert config(**{name: value}) == config()


def test_trust_remote_code() -> None:
    assert config(trust_remote_code=False) == config()
    with raises_sentence(ConfigError, "code of a checkpoint is never run", "nanoflow plugins new NAME --role model"):
        LLM(trust_remote_code=True)


def test_harmless_options_point_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="swap_space") as caught, pytest.raises(CheckpointError):
        LLM("no-such/model", swap_space=4)
    assert caught[0].filename == __file__


def test_the_table_hides_no_option_and_is_documented() -> None:
    """A name that means something here is never in the table, and the page has all of it."""
    known = {*field_names(EngineConfig), *REGISTRY.roles, "max_num_seqs", "max_num_batched_tokens", "checkpoint"}
    assert known.isdisjoint(set(VLLM_OPTIONS) - {"logits_processors"})
    assert known.issuperset(SPELLINGS)
    page = DOC.read_text(encoding="utf-8")
    missing = [name for name in (*VLLM_OPTIONS, *SPELLINGS) if f"`{name}`" not in page]
    assert missing == []
    for name in named(Renamed):
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert f"`{VLLM_OPTIONS[name].name}" in row, name


# Prompts

IDS = [5, 6, 7]
ONE_PROMPT = [
    TokensPrompt(prompt_token_ids=IDS),
    {"prompt_token_ids": np.array(IDS)},
    {"prompt_token_ids": torch.tensor(IDS)},
    np.array(IDS),
    np.array(IDS, np.uint16),
    torch.tensor(IDS),
    torch.tensor(IDS, dtype=torch.int32),
    [np.int64(id_) for id_ in IDS],
    [torch.tensor(id_) for id_ in IDS],
    tuple(IDS),
    BatchEncoding({"input_ids": IDS, "attention_mask": [1, 1, 1]}),
    BatchEncoding({"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}),
    BatchEncoding({"input_ids": torch.tensor([IDS])}),
    BatchEncoding({"input_ids": np.array([[0, *IDS]]), "attention_mask": np.array([[0, 1, 1, 1]])}),
]


@pytest.mark.parametrize("prompt", ONE_PROMPT, ids=range(len(ONE_PROMPT)))
def test_prompts_of_other_libraries(llm: LLM, prompt: Any) -> None:
    outputs = llm.generate(prompt, greedy(2), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [IDS]
    assert llm.encode(prompt) == (None, IDS)
    both = llm.generate([prompt, [8, 9]], greedy(1), use_tqdm=False)
    assert [output.prompt_token_ids for output in both] == [IDS, [8, 9]]
    assert llm.score(prompt, [[8]], use_tqdm=False)[0].token_ids == [8]


def test_several_texts_of_a_tokenizer(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    texts = ["HAMLET:", "JULIET: O"]
    expected = [tokenizer.encode(text) for text in texts]
    padded = BatchEncoding(
        {"input_ids": torch.tensor([[*expected[0], *[0] * (len(expected[1]) - len(expected[0]))], expected[1]]),
         "attention_mask": torch.tensor([[int(i < len(row)) for i in range(len(expected[1]))] for row in expected])},
    )  # fmt: skip
    for prompts in (tokenizer(texts), padded):
        outputs = llm.generate(prompts, greedy(1), use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == expected
    rows = llm.generate([np.array(row) for row in expected], greedy(1), use_tqdm=False)
    assert tokens(rows) == tokens(outputs)
    with raises_sentence(RequestError, "Prompt 0 must be one prompt, but the tokenizer was given 2 texts for it."):
        llm.encode(padded)


REFUSED_PROMPTS = [
    (np.array([[1, 2], [3, 4]]), "array of one dimension, got one of shape [2, 2]"),
    (torch.ones(2, 2, 2, dtype=torch.long), "got one of shape [2, 2, 2]"),
    (np.array([1.0, 2.0]), "got an array of float"),
    (torch.tensor([True, False]), "got an array of bool"),
    (np.array(["a"]), "got an array of str"),
    (np.array(5), "got one of shape []"),
    ([np.array([[1]])], "Prompt 0 must be token ids in an array of one dimension"),
    ([1, np.float32(2)], "Prompt 0 must be a text or a list of token ids"),
    ({"prompt_token_ids": np.array([[1]])}, "Prompt 0 must be token ids in an array of one dimension"),
    (BatchEncoding({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1]]}), "rows of equal lengths"),
    (BatchEncoding({"input_ids": "text"}), "must be"),
    (BatchEncoding({"input_ids": None}), "must be"),
]


@pytest.mark.parametrize(("prompt", "words"), REFUSED_PROMPTS, ids=range(len(REFUSED_PROMPTS)))
def test_arrays_that_hold_no_ids(llm: LLM, prompt: Any, words: str) -> None:
    with raises_sentence(RequestError, words):
        llm.generate(prompt, greedy(1), use_tqdm=False)


# Names


def test_public_names_are_listed() -> None:
    assert set(nanoflow.__all__) <= set(dir(nanoflow))
    for name in nanoflow.__all__:
        assert getattr(nanoflow, name) is not None


@pytest.mark.parametrize("start", [LLM, AsyncLLM])
def test_signatures_show_the_options(start: Any) -> None:
    parameters = inspect.signature(start).parameters
    assert next(iter(parameters)) == "checkpoint"
    assert {*field_names(EngineConfig), "max_num_seqs", "scheduler", "model", "observers"} <= set(parameters)
    assert parameters["block_size"].default == EngineConfig().block_size
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    assert "from-vllm.md" in LLM.__doc__


def test_names_that_others_have_for_fields() -> None:
    with raises_sentence(ConfigError, "SamplingParams() has no guided_decoding", "structured_outputs="):
        SamplingParams(guided_decoding=None)
    with raises_sentence(ConfigError, "SamplingParams() has no best_of, which is not supported; use n"):
        SamplingParams(best_of=4)
