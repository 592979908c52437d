"""What users do by mistake: one clear sentence each, and nobody else is harmed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.core.config.errors import ConfigError, NanoflowError, PluginError, RequestError
from tests.core.checkpoints import MAX_MODEL_LEN, VOCAB_SIZE, Oracle
from tests.core.running import check, engine_of, greedy, tokens
from tests.core.scripted import byte_level, scripted_llm
from tests.core.sentences import raises_sentence

TOO_LONG = pytest.param(10**5000, id="10**5000")  # for Python to write it


@pytest.fixture(scope="module")
def folder(oracle: Oracle) -> str:
    return str(oracle("plain").folder)


@pytest.fixture
def llm(folder: str, oracle: Oracle) -> Iterator[LLM]:
    """An LLM that must still answer rightly after the test."""
    with LLM(folder, dtype="float32", num_kv_blocks=64) as llm:
        yield llm
        check(llm, oracle("plain"), [3, 7])
        assert engine_of(llm).block_manager.num_free_blocks == 64


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """An LLM with a tokenizer."""
    tokenizer = byte_level()
    return scripted_llm(tmp_path_factory.mktemp("talker") / "checkpoint", tokenizer.encode("the end"), tokenizer)


def run(llm: LLM, prompts: Any, params: Any = None, **options: Any) -> list[list[int]]:
    return tokens(llm.generate(prompts, params or greedy(**({"max_tokens": 4} | options)), use_tqdm=False))


@pytest.mark.slow
def test_empty_prompt(llm: LLM, talker: LLM) -> None:
    with raises_sentence(RequestError, "The prompt is empty; give at least one token."):
        run(llm, [[]])
    with raises_sentence(RequestError, "The prompt is empty"):
        run(talker, "")
    with raises_sentence(RequestError, "Prompt 1: The prompt is empty"):
        run(llm, [[1], []])


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert run(llm, []) == []
    assert llm.stats.num_steps == 0


@pytest.mark.parametrize("length", [MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 5 * MAX_MODEL_LEN])
def test_prompt_at_and_past_max_model_len(llm: LLM, length: int) -> None:
    words = [f"has {length} tokens", "max_model_len is 256", "shorten the prompt to 255 tokens"]
    with raises_sentence(RequestError, *words):
        run(llm, [[1] * length])


def test_prompt_one_below_max_model_len(llm: LLM) -> None:
    """There is room for one token, however many are asked for."""
    output = llm.generate([[1] * (MAX_MODEL_LEN - 1)], greedy(50), use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 1
    assert output.finish_reason == "length"


def test_output_is_cut_at_max_model_len(llm: LLM) -> None:
    for max_tokens in (None, 10**6):
        output = llm.generate([[1] * 250], greedy(max_tokens), use_tqdm=False)[0].outputs[0]
        assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_smaller_max_model_len(folder: str, oracle: Oracle) -> None:
    llm = LLM(folder, dtype="float32", num_kv_blocks=64, max_model_len=20)
    with raises_sentence(RequestError, "has 20 tokens, but max_model_len is 20"):
        run(llm, [[1] * 20])
    assert run(llm, oracle("plain").prompts[4], max_tokens=9) == [oracle("plain").outputs[4][:5]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1, or None for as many as fit, got 0."),
        ({"max_tokens": -3}, "max_tokens must be an integer >= 1, or None for as many as fit, got -3."),
        ({"temperature": -1}, "temperature must be a number >= 0, got -1."),
        ({"temperature": float("nan")}, "temperature must be a number >= 0, got nan."),
        ({"top_p": 0}, "top_p must be a number in (0, 1], got 0."),
        ({"top_p": 1.5}, "top_p must be a number in (0, 1], got 1.5."),
    ],
)
def test_sampling_out_of_range(options: dict[str, Any], words: str) -> None:
    with raises_sentence(ConfigError, words):
        SamplingParams(**options)


@pytest.mark.parametrize("min_tokens", [253, 2**63, 10**19, TOO_LONG])
@pytest.mark.parametrize("is_bounded", [False, True])
def test_more_tokens_at_least_than_there_is_room_for(llm: LLM, min_tokens: int, is_bounded: bool) -> None:
    params = greedy(min_tokens if is_bounded else None, min_tokens=min_tokens)
    with raises_sentence(RequestError, "min_tokens must be at most 252, ", "(256)", "a prompt of 4 tokens"):
        run(llm, [[1] * 4], params)
    assert len(run(llm, [[1] * 4], greedy(None, min_tokens=252))[0]) == 252


@pytest.mark.parametrize("huge", [2**31, 2**63, 2**64, 10**400, TOO_LONG])
def test_huge_numbers_are_refused_or_harmless(llm: LLM, huge: int) -> None:
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        may_be = huge < 10**400 and name in ("temperature", "repetition_penalty")
        with nullcontext() if may_be else raises_sentence(ConfigError, f"{name} must be a number"):
            assert len(run(llm, [[1]], SamplingParams(**{name: huge, "max_tokens": 2}))[0]) == 2
    for name in ("seed", "top_k", "priority", "logprobs", "prompt_logprobs", "prompt_logprobs_start", "max_tokens",
                 "truncate_prompt_tokens"):  # fmt: skip
        assert run(llm, [[1, 2]], SamplingParams(**{"max_tokens": 2, "prompt_logprobs": 0, name: huge}))[0]
    assert run(llm, [[1]], SamplingParams(seed=-huge, priority=-huge, max_tokens=2))[0]
    for options in ({"logit_bias": {huge: 1.0}}, {"stop_token_ids": [huge]}, {"allowed_token_ids": [huge]}):
        with raises_sentence(RequestError, "is not in the vocabulary; ids go from 0 to 127."):
            run(llm, [[1]], **options)
    with raises_sentence(RequestError, "is not in the vocabulary; ids go from 0 to 127."):
        run(llm, [[huge]])


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**40, -(2**70)])
def test_ids_out_of_the_vocabulary(llm: LLM, token_id: int) -> None:
    words = [f"Token id {token_id} is not in the vocabulary", "ids go from 0 to 127"]
    with raises_sentence(RequestError, *words):
        run(llm, [[1, token_id, 2]])
    with raises_sentence(RequestError, "Prompt 1: ", *words):
        run(llm, [[1], [token_id], [2]])
    if token_id > 0:
        with raises_sentence(RequestError, *words):
            run(llm, [[1]], stop_token_ids=[3, token_id])
    assert llm.stats.num_steps == 0


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 2**40])
def test_sampling_ids_out_of_the_vocabulary(llm: LLM, token_id: int) -> None:
    words = [f"Token id {token_id} is not in the vocabulary", "ids go from 0 to 127"]
    with raises_sentence(RequestError, "logit_bias: ", *words):
        run(llm, [[1]], logit_bias={3: 1.0, token_id: 1.0})
    with raises_sentence(RequestError, "allowed_token_ids: ", *words):
        run(llm, [[1]], allowed_token_ids=[3, token_id])
    assert llm.stats.num_steps == 0


def test_nothing_but_stop_tokens_allowed(llm: LLM) -> None:
    params = greedy(allowed_token_ids=[3, 4], stop_token_ids=[4, 3, 5], min_tokens=2)
    with raises_sentence(RequestError, "All of allowed_token_ids are stop tokens, which min_tokens (2) forbids"):
        run(llm, [[1]], params)


def test_words_without_a_tokenizer(llm: LLM) -> None:
    with raises_sentence(RequestError, "bad_words need a tokenizer, and the checkpoint has none; use logit_bias."):
        run(llm, [[1]], bad_words=["word"])


@pytest.mark.parametrize(
    ("length", "max_tokens", "kept"),
    [(5, 4, 5), (1, 4, 1), (300, 4, 300), (-1, 4, MAX_MODEL_LEN - 4), (-1, None, MAX_MODEL_LEN - 1), (-1, 10**6, 1)],
)
def test_truncated_prompts(llm: LLM, oracle: Oracle, length: int, max_tokens: int | None, kept: int) -> None:
    """The last tokens stay, and a prompt that is too long as it is can be served so."""
    prompt = [i % VOCAB_SIZE for i in range(300)]
    params = greedy(max_tokens, truncate_prompt_tokens=length)
    if kept >= MAX_MODEL_LEN:
        with raises_sentence(RequestError, "has 300 tokens, but max_model_len is 256"):
            run(llm, [prompt], params)
        return
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_token_ids == prompt[-kept:]
    assert output["token_ids"] == run(llm, [prompt[-kept:]], greedy(max_tokens))[0]
    (short,) = llm.generate([prompt[:3]], greedy(2, truncate_prompt_tokens=10), use_tqdm=False)
    assert short.prompt_token_ids == prompt[:3]


@pytest.mark.parametrize("prompts", [None, 5, 1.5, b"text", {1, 2}, object, True])
def test_prompts_of_a_wrong_type(llm: LLM, prompts: Any) -> None:
    with raises_sentence(
        RequestError, "prompts must be a text, token ids, or a list of these, got ", type(prompts).__name__
    ):
        run(llm, prompts)


@pytest.mark.parametrize(
    "prompt", [None, 1.5, b"text", {}, {"prompt": None}, {"promt": "a"}, [1.0], ["1"], [None], [[1]], [True], {1, 2}]
)
def test_a_prompt_of_a_wrong_type_in_a_list(llm: LLM, prompt: Any) -> None:
    with raises_sentence(RequestError, "Prompt 1 must be a text or a list of token ids, got ", repr(prompt)[:20]):
        run(llm, [[1], prompt])


def test_long_values_are_cut_in_messages(llm: LLM) -> None:
    with raises_sentence(RequestError, "Prompt 0 must be"):
        run(llm, [["x" * 10_000]])


def test_text_without_a_tokenizer(llm: LLM) -> None:
    with raises_sentence(RequestError, "The checkpoint has no tokenizer", "give the prompt as token ids"):
        run(llm, "hello")
    with raises_sentence(RequestError, "The checkpoint has no tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_text_that_is_no_unicode(talker: LLM) -> None:
    with raises_sentence(RequestError):
        run(talker, "half a surrogate pair: \ud83c")


def test_words_that_are_no_unicode(talker: LLM) -> None:
    for options in ({}, {"allowed_token_ids": [1]}):
        with raises_sentence(RequestError, "The bad word '\\ud83c' is not valid Unicode; leave out lone surrogates."):
            run(talker, "the", bad_words=["end", "\ud83c"], **options)
    assert run(talker, "the", stop=["\ud83c"])  # which no text holds
    assert not engine_of(talker).has_unfinished


def test_ways_to_give_a_prompt(talker: LLM) -> None:
    ids = byte_level().encode("the")
    for prompt in ("the", ["the"], ids, [ids], tuple(ids), {"prompt": "the"}, [{"prompt_token_ids": ids}]):
        (output,) = talker.generate(prompt, greedy(2), use_tqdm=False)
        assert output.prompt_token_ids == ids
        assert output.prompt in ("the", None)
        assert output["text"] == output.outputs[0].text
        assert output["token_ids"] == output.outputs[0].token_ids
    with pytest.raises(KeyError, match="has the keys 'text' and 'token_ids'"):
        output["txt"]


@pytest.mark.parametrize("messages", [[], "hello", None, {"role": "user"}])
def test_messages_of_a_wrong_type(talker: LLM, messages: Any) -> None:
    with raises_sentence(RequestError, "messages must be a list of {'role': ..., 'content': ...}."):
        talker.chat(messages)


def test_chat_without_a_template(talker: LLM) -> None:
    with raises_sentence(RequestError, "no chat template; use generate()"):
        talker.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_params_of_the_wrong_length(llm: LLM, count: int) -> None:
    with raises_sentence(RequestError, f"2 prompts but {count} sampling_params; give one, or one for each prompt."):
        llm.generate([[1], [2]], [greedy()] * count, use_tqdm=False)


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", [None], [greedy(), 3], 0.5])
def test_params_of_a_wrong_type(llm: LLM, params: Any) -> None:
    with raises_sentence(RequestError, "sampling_params must be a SamplingParams or a list of them, got "):
        llm.generate([[1], [2]], params, use_tqdm=False)


@pytest.mark.slow
def test_ten_thousand_prompts(folder: str, oracle: Oracle) -> None:
    reference = oracle("plain")
    prompts = [reference.prompts[i % 6] if i % 100 == 0 else [1 + i % 127, 1 + i // 127] for i in range(10_000)]
    start = time.perf_counter()
    with LLM(folder, dtype="float32", num_kv_blocks=2000) as llm:
        outputs = run(llm, prompts, max_tokens=2)
    assert [len(output) for output in outputs] == [2] * 10_000
    assert all(outputs[i] == reference.outputs[i % 6][:2] for i in range(0, 10_000, 100))
    assert time.perf_counter() - start < 60


def test_a_request_that_can_never_fit(folder: str, oracle: Oracle) -> None:
    """It is refused with the numbers, and those that run go on."""
    llm = LLM(folder, dtype="float32", num_kv_blocks=6, block_size=8)
    engine = engine_of(llm)
    reference = oracle("plain")
    engine.add_request("before", reference.prompts[5], greedy())
    engine.step()
    words = [
        "needs a KV cache of 52 tokens (prompt 33, output up to 20)",
        "6 blocks of 8 tokens",
        "engine.num_kv_blocks",
    ]
    with raises_sentence(RequestError, *words):
        engine.add_request("never", reference.prompts[9], greedy())
    engine.add_request("just", reference.prompts[9], greedy(16))  # 48 tokens: all that there is
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output["token_ids"] for output in engine.step()}
    assert outputs == {"before": reference.outputs[5], "just": reference.outputs[9][:16]}
    with raises_sentence(RequestError, "Prompt 1: The request needs a KV cache of 52 tokens"):
        run(llm, [reference.prompts[5], reference.prompts[9]], max_tokens=20)
    assert not engine.has_unfinished
    check(llm, reference, [5])


def test_duplicate_request_ids(folder: str) -> None:
    engine = engine_of(LLM(folder, num_kv_blocks=64))
    engine.add_request("twice", [1, 2], greedy(2))
    with raises_sentence(RequestError, "There is an unfinished request 'twice' already; ids must differ."):
        engine.add_request("twice", [3], greedy(2))
    while engine.has_unfinished:
        engine.step()
    engine.add_request("twice", [3], greedy(2))


@pytest.mark.slow
def test_two_engines_side_by_side(oracle: Oracle) -> None:
    """Each step of one between two steps of the other, with different checkpoints and shapes."""
    engines, outputs = {}, {}
    for name, options in {
        "plain": {"block_size": 4},
        "gqa4": {"overlap": True},
        "bias": {"num_kv_blocks": 25, "block_size": 4},
    }.items():
        llm = LLM(str(oracle(name).folder), **{"dtype": "float32", "num_kv_blocks": 64} | options)
        engines[name], outputs[name] = engine_of(llm), {}
        for index, prompt in enumerate(oracle(name).prompts):
            engines[name].add_request(str(index), prompt, greedy())
    while any(engine.has_unfinished for engine in engines.values()):
        for name, engine in engines.items():
            if engine.has_unfinished:
                outputs[name] |= {int(output.request_id): output["token_ids"] for output in engine.step()}
    for name in engines:
        assert [tokens for _, tokens in sorted(outputs[name].items())] == oracle(name).outputs


def test_two_engines_one_after_the_other(oracle: Oracle) -> None:
    for name in ("plain", "gqa4", "plain"):
        with LLM(str(oracle(name).folder), dtype="float32", num_kv_blocks=64) as llm:
            check(llm, oracle(name))


@pytest.mark.parametrize(
    ("option", "guess"),
    [("max_num_seq", "max_num_seqs"), ("dtyp", "dtype"), ("sheduler", "scheduler"), ("checkpont", "checkpoint")],
)
def test_unknown_keyword(folder: str, option: str, guess: str) -> None:
    with raises_sentence(ConfigError, f"LLM() has no option '{option}'; it has: ", f"Did you mean '{guess}'?"):
        LLM(folder, **{option: 1})


def test_unknown_keyword_unlike_any(folder: str) -> None:
    with raises_sentence(ConfigError, "LLM() has no option 'zzz'; it has: accelerate, attention, block_manager, "):
        LLM(folder, zzz=1)


@pytest.mark.parametrize("role", ["model", "attention", "scheduler", "block_manager"])
@pytest.mark.parametrize("name", ["no-such-plugin", "", None, 3])
def test_unknown_plugin(folder: str, role: str, name: Any) -> None:
    with raises_sentence(PluginError, f"There is no {role} called {name!r}; installed are: "):
        LLM(folder, **{role: name})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, ["engine.device must be auto, cpu, cuda or cuda:N, got 'tpu'."]),
        ({"device": "cuda:99"}, ["engine.device=cuda:99 asks for a GPU"]),
        ({"dtype": "float8"}, ["engine.dtype must be one of ", "got 'float8'."]),
        ({"block_size": 0}, ["engine.block_size must be an integer >= 1, got 0."]),
        ({"kv_cache_gib": 1e-9, "num_kv_blocks": None}, ["There is room for ", "raise engine.kv_cache_gib"]),
        ({"max_num_seqs": 0}, ["scheduler.max_num_seqs must be an integer >= 1, got 0."]),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, ["an integer >= max_num_seqs (9)", "got 8."]),
        ({"num_kv_blocks": 10**12}, ["num_kv_blocks"]),
    ],
)
def test_options_out_of_range(folder: str, options: dict[str, Any], words: list[str]) -> None:
    with raises_sentence(ConfigError, *words):
        LLM(folder, **{"num_kv_blocks": 64} | options)


def test_closed(folder: str) -> None:
    llm = LLM(folder, num_kv_blocks=64)
    assert run(llm, [1, 2])
    llm.close()
    llm.close()
    assert llm.describe()["model"] == "qwen3"
    for use in (
        lambda: run(llm, [1, 2]),
        lambda: run(llm, []),
        lambda: llm.chat([{"role": "user"}]),
        lambda: llm.stats,
    ):
        with raises_sentence(NanoflowError, "This LLM was closed; make a new one."):
            use()


def test_a_failing_step_stops_the_engine(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(folder, num_kv_blocks=64)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_of(llm).executor, "submit", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(llm, [1, 2])
    with raises_sentence(
        NanoflowError, "The engine stopped at an earlier error (RuntimeError('out of memory')); make a new one."
    ):
        run(llm, [1, 2])
    assert not engine_of(llm).has_unfinished


def test_a_refused_call_leaves_nothing_behind(llm: LLM, oracle: Oracle) -> None:
    good = oracle("plain").prompts[0]
    with raises_sentence(RequestError, "Prompt 2: "):
        run(llm, [good, good, [VOCAB_SIZE]])
    assert not engine_of(llm).has_unfinished
    assert llm.stats.num_steps == 0


def test_an_idle_engine_may_be_stepped(llm: LLM) -> None:
    assert engine_of(llm).step() == []


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupted_call_leaves_the_caches_counters_sound(tmp_path: Path, overlap: bool) -> None:
    """Requests aborted from outside while others go on."""
    engine = engine_of(scripted_llm(tmp_path, [5, 6, 7], overlap=overlap, scheduler={"max_num_seqs": 4}))
    for index in range(12):
        engine.add_request(str(index), [1, 2, index], greedy(10))
    ended = []
    for index in (0, 11, 5, 2):
        ended += engine.step()
        assert engine.abort(str(index)) is not None
    while engine.has_unfinished:
        ended += engine.step()
    assert sorted(int(output.request_id) for output in ended) == [1, 3, 4, 6, 7, 8, 9, 10]
    assert all(len(output["token_ids"]) == 10 for output in ended)
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert sorted(engine.executor.inputs.free_slots) == [0, 1, 2, 3]


def test_no_max_tokens_goes_as_far_as_the_cache(folder: str, oracle: Oracle) -> None:
    """The KV cache is smaller than max_model_len; the last token needs no place in it."""
    with LLM(folder, dtype="float32", num_kv_blocks=4) as llm:  # 64 tokens
        output = llm.generate([[1] * 10], greedy(None), use_tqdm=False)[0].outputs[0]
        assert (len(output.token_ids), output.finish_reason) == (55, "length")
        full = llm.generate([[1] * 64], greedy(None), use_tqdm=False)[0].outputs[0]
        assert len(full.token_ids) == 1
        with raises_sentence(RequestError, "needs a KV cache of 65 tokens"):
            run(llm, [[1] * 65], greedy(None))
        with raises_sentence(RequestError, "min_tokens must be at most 55, which is what the KV cache (65) leaves"):
            run(llm, [[1] * 10], greedy(None, min_tokens=56))
        check(llm, oracle("plain"), [3])


@pytest.mark.parametrize("params", [{"temperature": 1}, "x", 5, [5], {}])
def test_sampling_params_of_a_wrong_type(llm: LLM, params: Any) -> None:
    with raises_sentence(RequestError, "sampling_params must be a SamplingParams"):
        llm.generate([[1]], params, use_tqdm=False)


@pytest.mark.parametrize("priority", ["x", 1.5, [None], {}])
def test_priority_of_a_wrong_type(llm: LLM, priority: Any) -> None:
    with raises_sentence(ConfigError, "priority must be an integer, got "):
        llm.generate([[1]], greedy(1), use_tqdm=False, priority=priority)
