"""Structured output: always valid, whatever else is in the batch, and errors that say what is wrong."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow import LLM, SamplingParams, StructuredOutputsParams
from nanoflow.core.config.errors import RequestError
from nanoflow.core.data.outputs import CompletionOutput
from nanoflow.core.loading.hub import resolve
from nanoflow.core.sampling.logits import mask_bits
from nanoflow.core.text.tokenizer import Tokenizer
from nanoflow.plugins.logits_processors import grammar_compiler
from nanoflow.plugins.logits_processors.grammar_compiler import GrammarCompiler
from nanoflow.plugins.logits_processors.grammar_state import Grammar
from nanoflow.testing.checkpoints import edit_json
from tests.core.checkpoints import Oracle
from tests.core.running import engine_of, recorded, tokens
from tests.core.schemas import matches, random_schema
from tests.core.scripted import byte_level, sentencepiece_like
from tests.core.sentences import raises_sentence

PROMPT = "HAMLET:\n"
EOS = 0
NUM_SCHEMAS = 150
PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 20},
        "favourite_colour": {"enum": ["aquamarine", "cornflower"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["full_name", "favourite_colour", "age"],
    "additionalProperties": False,
}
KINDS: list[dict[str, Any]] = [
    {"json": PERSON}, {"regex": "[a-z]{2,20}"}, {"choice": ["to be", "to be or not", "日本🎭"]}, {"json_object": True},
    {"grammar": 'start: "(" start ")" | /[a-c]/'}, {"json": {"type": "array", "items": PERSON, "maxItems": 2}},
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_kv_blocks=2000, max_num_seqs=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(llm: LLM) -> Tokenizer:
    tokenizer = engine_of(llm).tokenizer
    assert tokenizer is not None
    return tokenizer


def sampling(seed: int = 0, max_tokens: int = 200, **options: Any) -> SamplingParams:
    """Drawn at temperature 1; keywords that are kinds of structured output make one."""
    kinds = {name: options.pop(name) for name in list(options) if name in StructuredOutputsParams.__annotations__}
    held = StructuredOutputsParams(**kinds) if kinds else None
    return SamplingParams(seed=seed, max_tokens=max_tokens, structured_outputs=held, **options)


def draw(llm: LLM, count: int = 1, **options: Any) -> list[CompletionOutput]:
    """Outputs of seeds 0 to `count` - 1."""
    params = [sampling(seed, **options) for seed in range(count)]
    return [output.outputs[0] for output in llm.generate([PROMPT] * count, params, use_tqdm=False)]


@pytest.mark.slow
def test_json_is_valid_for_random_schemas(llm: LLM) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]
    params = [sampling(seed, 1500, json=schema) for seed, schema in enumerate(schemas)]
    sizes = []
    for schema, output in zip(schemas, llm.generate([PROMPT] * len(schemas), params, use_tqdm=False), strict=True):
        completion = output.outputs[0]
        assert completion.finish_reason == "stop", (schema, completion)
        assert matches(schema, json.loads(completion.text)), (schema, completion.text)
        sizes.append(len(completion.token_ids))
    assert max(sizes) > 100


def test_the_validator_of_these_tests() -> None:
    assert matches(PERSON, {"full_name": "x", "favourite_colour": "aquamarine", "age": 3})
    for wrong in ({"age": -1}, {"age": True}, {"full_name": "x" * 21}, {"favourite_colour": "red"}, {"other": 1}):
        assert not matches(PERSON, {"full_name": "x", "favourite_colour": "aquamarine", "age": 3} | wrong)


@pytest.mark.slow
@pytest.mark.parametrize("schema", [json.dumps(PERSON), type("Model", (), {"model_json_schema": lambda: PERSON})])
def test_a_schema_as_text_or_from_a_model(llm: LLM, schema: Any) -> None:
    assert draw(llm, 2, json=schema) == draw(llm, 2, json=PERSON)


@pytest.mark.slow
def test_json_object(llm: LLM) -> None:
    completions = [c for c in draw(llm, 20, json_object=True) if c.finish_reason == "stop"]
    assert len(completions) > 5
    assert all(isinstance(json.loads(completion.text), dict) for completion in completions)


@pytest.mark.parametrize(
    "regex",
    [
        "[a-z]{3,9}( [a-z]{1,9}){2}", r"\d{3}-\d{4}", "(yes|no)!{1,3}", "[^a-zA-Z ]{4}", ".{10}", "é{2}日本[à-ü]",
        "🎭+🎉", "[ぁ-ん]{5}", "[\U0001f300-\U0001f5ff]{3}", "^anchored$", "a?b?c", "(a|ab)(c|bcd)", r"\n\t\"\\ /",
        "(?i)hamlet",
    ],
)  # fmt: skip
def test_regex(llm: LLM, regex: str) -> None:
    """Letters that are several tokens are never cut."""
    for completion in draw(llm, 6, regex=regex):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(regex, completion.text), completion.text


@pytest.mark.slow
def test_choice(llm: LLM) -> None:
    choices = ["yes", "yes, my lord", "no", 'quo"te', "back\\slash", "\n", "\x01", "日本", "🎉", "a/b", "<|endoftext"]
    drawn = {completion.text for completion in draw(llm, 60, temperature=5.0, choice=choices)}
    assert drawn <= set(choices)
    assert len(drawn) > 5
    for choice in choices:
        assert [c.text for c in draw(llm, 2, choice=[choice])] == [choice] * 2


@pytest.mark.parametrize(
    "grammar", ['start: "(" start ")" | /[a-c]/', 'root ::= "(" root ")" | [a-c]'], ids=["lark", "gbnf"]
)
def test_grammar(llm: LLM, grammar: str) -> None:
    for completion in draw(llm, 10, grammar=grammar):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(r"(\(*)[a-c](\)*)", completion.text)
        assert completion.text.count("(") == completion.text.count(")")


@pytest.mark.slow
def test_special_tokens_are_never_inside(llm: LLM) -> None:
    for completion in draw(llm, 10, regex="(?s).{20}.*", temperature=3.0):
        assert EOS not in completion.token_ids[:-1]


def test_the_text_of_a_special_token_can_not_be_dictated(llm: LLM) -> None:
    """llguidance would write it as that token, which it does not take then."""
    completion = draw(llm, choice=["<|endoftext|>"])[0]
    assert (completion.text, completion.finish_reason) == ("", "error")


@pytest.mark.slow
def test_end_of_sequence_only_where_the_output_may_end(llm: LLM) -> None:
    """And it is drawn there like any other token."""
    completions = draw(llm, 30, regex="a{3}(b|c)*", temperature=2.0)
    assert all(re.fullmatch("a{3}(b|c)*", c.text) for c in completions)
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert ended
    assert all(c.token_ids[-1] == EOS and c.stop_reason is None for c in ended)


def test_a_complete_output_ends_without_one(llm: LLM) -> None:
    for completion in draw(llm, 5, choice=["to be"]):
        assert (completion.text, completion.finish_reason, completion.stop_reason) == ("to be", "stop", None)
        assert EOS not in completion.token_ids


@pytest.mark.slow
def test_max_tokens_may_cut_it(llm: LLM) -> None:
    completion = draw(llm, json=PERSON, max_tokens=9)[0]
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 9)
    whole = draw(llm, json=PERSON)[0]
    assert whole.token_ids[:9] == completion.token_ids
    exact = draw(llm, json=PERSON, max_tokens=len(whole.token_ids))[0]
    assert exact == whole


def test_ignore_eos_goes_on_while_the_grammar_does(llm: LLM) -> None:
    going_on = draw(llm, 5, regex="a+", max_tokens=30, ignore_eos=True)
    assert {(c.finish_reason, len(c.token_ids), set(c.text) <= {"a"}) for c in going_on} == {("length", 30, True)}
    assert {c.finish_reason for c in draw(llm, 5, regex="a{3}", ignore_eos=True)} == {"stop"}


def test_min_tokens_yields_to_the_grammar(llm: LLM) -> None:
    params = {"max_tokens": 30, "min_tokens": 10}
    for completion in draw(llm, 10, regex="[ab]+", **params):
        assert len(completion.token_ids) >= 10
    for completion in draw(llm, 10, regex="a{3}", **params):
        assert (completion.text, completion.finish_reason) == ("aaa", "stop")


def test_stop_tokens_and_strings_end_it_early(llm: LLM, tokenizer: Tokenizer) -> None:
    (comma,) = tokenizer.encode(",")
    completion = draw(llm, json=PERSON, stop_token_ids=[comma])[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", comma)
    assert completion.token_ids.index(comma) == len(completion.token_ids) - 1
    assert {c.finish_reason for c in draw(llm, 3, regex=",{3}", stop_token_ids=[comma], min_tokens=4)} == {"stop"}


def test_a_stop_string_in_what_the_grammar_dictates(llm: LLM, tokenizer: Tokenizer) -> None:
    completion = draw(llm, json=PERSON, stop=["rite_col"])[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "rite_col")
    assert completion.text.endswith('"favou')
    said = tokenizer.decode(completion.token_ids)
    assert "rite_col" in said
    assert "rite_col" not in tokenizer.decode(completion.token_ids[:-1])


def test_tokens_without_a_choice_are_not_sampled(llm: LLM) -> None:
    text = "the quality of mercy is not strained"
    with recorded(llm) as batches:
        completion = draw(llm, regex=f"[ab]{text}[cd]")[0]
    assert text in completion.text
    assert len(batches) < len(completion.token_ids) / 2
    assert sum(sum(batch.samples) for batch in batches) == len(batches)


def mixed(**options: Any) -> tuple[list[list[int]], int]:
    """Tokens of requests of every kind, with an ordinary one after each; and how often one was preempted."""
    with LLM(device="cpu", **{"num_kv_blocks": 512, "block_size": 4, "max_model_len": 256} | options) as llm:
        params = [
            p for seed, kind in enumerate(KINDS * 2)
            for p in (sampling(seed, 60, **kind), sampling(seed, 30, ignore_eos=True))
        ]  # fmt: skip
        prompts = [f"{PROMPT} {index}" for index in range(len(params))]
        return tokens(llm.generate(prompts, params, use_tqdm=False)), llm.stats.num_preemptions


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True}, {"max_num_seqs": 1}, {"max_num_seqs": 3, "max_num_batched_tokens": 7, "overlap": True},
        {"num_kv_blocks": 40, "max_model_len": 100}, {"num_kv_blocks": 40, "max_model_len": 100, "overlap": True},
        {"block_manager": "plain", "num_kv_blocks": 40, "max_model_len": 100, "overlap": True},
    ],
)  # fmt: skip
def test_same_tokens_in_any_batch(options: dict[str, Any]) -> None:
    """Overlapped, chunked, preempted; with and without a prefix cache."""
    outputs, num_preemptions = mixed(**options)
    assert outputs == mixed()[0]
    assert (num_preemptions > 0) == ("num_kv_blocks" in options)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_ordinary_requests_are_unharmed(overlap: bool) -> None:
    together = mixed(overlap=overlap)[0][1::2]
    with LLM(device="cpu", num_kv_blocks=512, block_size=4, max_model_len=256) as llm:
        params = [sampling(seed, 30, ignore_eos=True) for seed in range(len(together))]
        alone = tokens(llm.generate([f"{PROMPT} {2 * i + 1}" for i in range(len(together))], params, use_tqdm=False))
    assert together == alone


@pytest.mark.slow
def test_with_filters_and_greedy(llm: LLM) -> None:
    for options in ({"top_k": 1}, {"top_p": 0.5, "top_k": 20}, {"min_p": 0.3}, {"temperature": 0.0}):
        for completion in draw(llm, 4, json=PERSON, **options):
            assert matches(PERSON, json.loads(completion.text))


class SlowCompiler(GrammarCompiler):
    """Compiles when it is told to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.go_on = threading.Event()

    def _compiled(self, params: SamplingParams, grammar: str) -> Grammar:
        assert self.go_on.wait(60)
        return super()._compiled(params, grammar)


@pytest.fixture
def slow(llm: LLM) -> Iterator[SlowCompiler]:
    engine = engine_of(llm)
    processor = engine.processors.by_name["grammar"]
    usual = processor.compiler
    processor.compiler = slow = SlowCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    yield slow
    slow.go_on.set()
    slow.close()
    processor.compiler = usual


def test_small_grammars_dont_wait_for_large_ones(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, held = engine_of(llm).processors.by_name["grammar"].compiler, threading.Event()
    matcher = compiler.matcher
    monkeypatch.setattr(compiler, "matcher", lambda text: (len(text) < 1000 or held.wait(60)) and matcher(text))
    large = {"enum": ["a" * 20_000]}
    futures = [compiler.submit(sampling(json=large)) for _ in range(20)]
    assert compiler.submit(sampling(choice=["to be"])).result(timeout=30)
    assert not any(future.done() for future in futures)
    assert futures[-1].cancel(), "one that was not begun is never compiled"
    held.set()
    assert all(future.result(timeout=30) for future in futures[:-1])


def test_a_choice_of_thousands(llm: LLM) -> None:
    words = [f"{index * 7919 % 5000:x} {index}" for index in range(5000)]
    drawn = draw(llm, 8, temperature=5.0, choice=words)
    assert all(completion.text in words and completion.finish_reason == "stop" for completion in drawn)
    assert len({completion.text for completion in drawn}) > 1


def test_threads_end_with_the_engine() -> None:
    with LLM(device="cpu", num_kv_blocks=200) as llm:
        compiler = engine_of(llm).processors.by_name["grammar"].compiler
        draw(llm, choice=["to be"])
        threads = [*compiler.pool._threads]
        assert threads
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_others_run_while_a_grammar_is_compiled(llm: LLM, slow: SlowCompiler) -> None:
    engine = engine_of(llm)
    engine.add_request("held", [5], sampling(choice=["to be"]))
    engine.add_request("free", [5], sampling(max_tokens=5, ignore_eos=True))
    ended = [output.request_id for _ in range(8) for output in engine.step()]
    assert ended == ["free"]
    assert engine.has_unfinished
    assert [engine.step() for _ in range(3)] == [[], [], []]  # waits a little, and comes back
    slow.go_on.set()
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [output["text"] for output in outputs] == ["to be"]


def test_abort_while_a_grammar_is_compiled(llm: LLM, slow: SlowCompiler) -> None:
    engine = engine_of(llm)
    for name in ("a", "b"):
        engine.add_request(name, [5], sampling(choice=["to be"]))
    output = engine.abort("a")
    assert output is not None
    assert (output.outputs[0].finish_reason, output["token_ids"]) == ("abort", [])
    assert engine.abort("a") is None
    assert engine.abort("b") is not None
    assert not engine.has_unfinished
    slow.go_on.set()
    assert engine.step() == []


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"json": {"type": "foo"}}, "structured_outputs.json can't be used: Invalid type: foo."),
    "keyword": ({"json": {"not": {"type": "null"}}}, "Unimplemented keys"),
    "unsatisfiable": ({"json": {"enum": []}}, "Unsatisfiable schema"),
    "reference": ({"json": {"$ref": "#/nope"}}, "does not exist"),
    "regex": ({"regex": "(a"}, "structured_outputs.regex can't be used: unclosed group."),
    "look-ahead": ({"regex": "a(?=b)"}, "look-ahead"),
    "rule": ({"grammar": "start: a"}, "structured_outputs.grammar can't be used: at 1(8): unknown name"),
    "gbnf": ({"grammar": "root ::= a"}, "Rule 'a' not found"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_grammar_is_refused_at_once(llm: LLM, name: str) -> None:
    kind, words = WRONG[name]
    with raises_sentence(RequestError, words):
        llm.generate([PROMPT, PROMPT], [sampling(), sampling(**kind)], use_tqdm=False)
    with raises_sentence(RequestError, words):
        engine_of(llm).add_request("x", [5], sampling(**kind))
    assert not engine_of(llm).has_unfinished


def test_one_that_turns_out_to_be_bad_ends_its_request_alone(llm: LLM) -> None:
    """This one names a token that the tokenizer lacks, which is not known without it."""
    params = [sampling(max_tokens=5, ignore_eos=True), sampling(grammar="start: <|nobody|>"), sampling(regex="a")]
    first, bad, last = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    assert len(first["token_ids"]) == 5
    assert last["text"] == "a"
    completion = bad.outputs[0]
    assert (completion.finish_reason, completion.token_ids) == ("error", [])
    assert "structured_outputs.grammar can't be used" in str(completion.stop_reason)
    assert "<|nobody|>" in str(completion.stop_reason)


def test_an_output_that_strays_ends_with_an_error(llm: LLM) -> None:
    """A matcher that gives up in the middle, as it does where a grammar gets too complex."""
    engine = engine_of(llm)
    engine.add_request("x", [5], sampling(regex="[ab]{9}"))
    while not engine.requests["x"].sequences[0].output_token_ids:
        assert engine.step() == []
    grammar = engine.requests["x"].sequences[0].constraint
    assert grammar is not None
    grammar.matcher.consume_token(EOS)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert outputs[0].outputs[0].finish_reason == "error"
    assert str(outputs[0].outputs[0].stop_reason).startswith("The output can't be held to structured_outputs: ")


def test_without_the_package(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "find_spec", lambda name: None if name == "llguidance" else find_spec(name))
    with raises_sentence(RequestError, "pip install 'nanoflow-engine[structured]'"):
        draw(llm, regex="a")


def test_without_a_tokenizer(oracle: Oracle) -> None:
    with (
        LLM(str(oracle("plain").folder), num_kv_blocks=64) as llm,
        raises_sentence(RequestError, "needs a tokenizer"),
    ):
        llm.generate([[1, 2]], sampling(regex="a"), use_tqdm=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_masks(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    allowed = torch.rand(3, -(-vocab_size // 32) * 32, generator=generator) < 0.5
    words = [np.packbits(row.numpy(), bitorder="little").view(np.int32) for row in allowed]
    logits = torch.randn(5, vocab_size, generator=generator).to(dtype)
    expected = logits.clone()
    for row, bits in zip((0, 1, 4), allowed, strict=True):
        expected[row, ~bits[:vocab_size]] = -torch.inf
    mask_bits(logits, torch.tensor([0, 1, 4], dtype=torch.int32), torch.from_numpy(np.stack(words)))
    assert torch.equal(logits, expected)


def test_ids_past_the_tokenizers_are_forbidden(tokenizer: Tokenizer) -> None:
    """A checkpoint's vocabulary is often padded."""
    num_known = len(tokenizer.hf)
    compiler = GrammarCompiler(tokenizer, num_known + 100, frozenset({EOS}))
    grammar = compiler.submit(sampling(regex="(?s).*")).result()
    logits = torch.zeros(2, num_known + 100)
    mask_bits(logits, torch.tensor([1], dtype=torch.int32), torch.from_numpy(grammar.mask()).unsqueeze(0))
    assert logits[0].isfinite().all()
    assert not logits[1, num_known:].isfinite().any()
    assert logits[1, EOS].isfinite()
    assert logits[1].isfinite().sum() > 0.8 * num_known


def test_ids_past_the_models_are_never_generated(tmp_path: Path) -> None:
    """A tokenizer may know tokens that the model has no logits for; texts are written without them."""
    folder = Path(shutil.copytree(resolve("bard"), tmp_path / "checkpoint"))
    texts = ["the surname is", "the surname was"]
    added = {"id": 2048, "content": "surname", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}  # fmt: skip
    edit_json(folder / "tokenizer.json", lambda values: values["added_tokens"].append(added))
    with LLM(str(folder), device="cpu", num_kv_blocks=100) as other:
        assert {output.text for output in draw(other, 4, choice=texts)} <= set(texts)
        assert {output.text for output in draw(other, 4, choice=texts, logprobs=0)} <= set(texts)
        assert all(output.token_ids for output in draw(other, 4, max_tokens=8, bad_words=["surname", "the surname"]))


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_vocabulary_smaller_than_the_tokenizers(make: Callable[[], Any], cut: int) -> None:
    whole = Tokenizer(make())
    vocab_size = len(whole.hf) - cut
    grammar = GrammarCompiler(whole, vocab_size, frozenset({1})).submit(sampling(regex="(the |end ){9}")).result()
    rng = random.Random(0)
    for _ in range(200):
        assert all(token_id < vocab_size for token_id in grammar.forced())
        allowed = np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little"))
        assert len(allowed)
        assert allowed.max() < vocab_size
        assert grammar.accept(int(rng.choice(allowed)))
        if grammar.is_complete:
            return
    raise AssertionError("it never ends")


def test_equal_grammars_are_compiled_once(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, 2048, frozenset({EOS}))
    first, second = (compiler.submit(sampling(regex="ab")).result() for _ in range(2))
    assert compiler.matcher.cache_info().misses == 1
    assert first.accept(tokenizer.encode("a")[0])
    assert np.array_equal(second.mask(), compiler.submit(sampling(regex="ab")).result().mask())
    assert not np.array_equal(first.mask(), second.mask())


def test_prompts_file_holds_grammars(llm: LLM, tmp_path: Path) -> None:
    from nanoflow.cli import prompts_file

    path = tmp_path / "in.jsonl"
    lines = [{"prompt": PROMPT, "structured_outputs": kind} for kind in KINDS] + [{"prompt": PROMPT}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for base in (SamplingParams(), sampling(regex="a")):
        _, params = prompts_file.read(str(path), base)
        held = [p.structured_outputs for p in params]
        assert held == [*(StructuredOutputsParams(**kind) for kind in KINDS), base.structured_outputs]
