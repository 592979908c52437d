"""What every logits processor must do, by itself and in an engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nanoflow.core.api.llm import LLM
from nanoflow.core.config.engine_config import BUNDLED_CHECKPOINT, Config, EngineConfig, PluginChoice
from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.sampling_params import SamplingParams, StructuredOutputsParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.loading.generation_config import eos_token_ids
from nanoflow.core.loading.hf_config import read_config
from nanoflow.core.loading.hub import resolve
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.text.load_tokenizer import load_tokenizer
from nanoflow.testing.suite import Suite

NUM_SLOTS = 12
NUM_TOKENS = 24  # of each output, unless it ends before
PATIENCE = 30  # seconds that preparing may take


class LogitsProcessorSuite(Suite):
    """The logits processor without an engine, with random logits of the bundled checkpoint's vocabulary; then in one.

    Attributes:
        requests: arguments of `SamplingParams` by any names: requests that use it, as different as can be.
        refused: arguments of `SamplingParams` that `check` must refuse, by any names.
        vocab_size: of the random logits; 0 is the bundled checkpoint's. With a small one, what has to do with certain
            tokens happens often.
    """

    role = "logits_processors"
    requests: ClassVar[dict[str, dict[str, Any]]]
    refused: ClassVar[dict[str, dict[str, Any]]] = {}
    vocab_size: ClassVar[int] = 0

    @classmethod
    def setup_class(cls) -> None:
        """The bundled checkpoint's tokenizer, which says how large the vocabulary is."""
        folder = resolve(BUNDLED_CHECKPOINT)
        hf_config = read_config(folder)
        cls.tokenizer = load_tokenizer(folder)
        cls.vocab_size = cls.vocab_size or hf_config["vocab_size"]
        assert cls.tokenizer is not None
        cls.eos_token_ids = eos_token_ids(folder, hf_config, cls.vocab_size, cls.tokenizer.eos_token_id)

    @classmethod
    def rig(cls) -> Rig:
        """The processor under test, freshly built, with nobody in its slots."""
        component, config = cls.plugin()
        context = LogitsProcessorContext(
            cls.vocab_size, NUM_SLOTS, torch.device("cpu"), cls.tokenizer, cls.eos_token_ids, 1024
        )
        processor = component.build(config, context)
        return Rig(LogitsProcessors({component.name: processor}, NUM_SLOTS), cls.vocab_size, cls.eos_token_ids)

    @classmethod
    def params(cls) -> list[SamplingParams]:
        """Each of `requests` twice, for other prompts."""
        assert getattr(cls, "requests", None), f"{cls.__name__} needs an attribute `requests`"
        return [params_of(arguments) for arguments in cls.requests.values() for _ in range(2)]

    @classmethod
    def alone(cls) -> list[Output]:
        """What becomes of each request that has the processor for itself."""
        outputs = []
        for index, params in enumerate(cls.params()):
            rig = cls.rig()
            output = rig.add(index, params)
            while not output.is_done:
                rig.step([output])
            outputs.append(output)
        return outputs

    def test_something_is_changed(self) -> None:
        """By every request, or what else is tested here means nothing."""
        for arguments in self.requests.values():
            rig = self.rig()
            outputs = [rig.add(number, params_of(arguments)) for number in range(3)]
            while any(not output.is_done for output in outputs):
                rig.step([output for output in outputs if not output.is_done])
            assert any(output.was_changed for output in outputs), f"no logits are changed by {arguments}"

    def test_batches(self) -> None:
        """In any batch, in any of its rows and any slot, every request gets what it gets alone."""
        rig, rng, expected = self.rig(), random.Random(0), self.alone()
        outputs = [rig.add(index, params) for index, params in enumerate(self.params())]
        while left := [output for output in outputs if not output.is_done]:
            rig.step(some_of(left, rng))
        compare(outputs, expected)

    def test_steps_overlap(self) -> None:
        """Also if a step begins before the last one's tokens are known, for requests that don't wait for them."""
        rig, rng, expected = self.rig(), random.Random(1), self.alone()
        outputs = [rig.add(index, params) for index, params in enumerate(self.params())]
        while left := [output for output in outputs if not output.is_done]:
            rig.step(some_of(left, rng), overlap=True)
        compare(outputs, expected)

    def test_preemption(self) -> None:
        """A sequence that gets a slot again goes on as if it had never lost it."""
        rig, rng, expected = self.rig(), random.Random(2), self.alone()
        outputs = [rig.add(index, params) for index, params in enumerate(self.params())]
        while left := [output for output in outputs if not output.is_done]:
            rig.step(some_of(left, rng), overlap=rng.random() < 0.5)
            if rng.random() < 0.5:
                rig.preempt(rng.choice(outputs))
        compare(outputs, expected)

    def test_a_slot_used_again(self) -> None:
        """Whoever had a slot before leaves nothing behind in it."""
        expected, rig = self.alone(), self.rig()
        rig.free = [5]
        order = [*range(len(expected)), *reversed(range(len(expected)))]
        outputs = []
        for number in order:
            output = rig.add(number, self.params()[number])
            while not output.is_done:
                rig.step([output])
            outputs.append(output)
        compare(outputs, [expected[number] for number in order])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_of_others(self, dtype: torch.dtype) -> None:
        """Only the rows that it is given are changed, and nothing but logits: asked again, it does the same."""
        rig = self.rig()
        outputs = [rig.add(index, params) for index, params in enumerate(self.params()[:NUM_SLOTS])]
        for _ in range(NUM_TOKENS):
            for output in outputs:
                rig.give_slot(output, outputs)
            if any(map(rig.wants, outputs)):
                break
            rig.step(outputs)
        outputs = list(filter(rig.wants, outputs))
        assert outputs, "no request wants its logits changed"
        processor = rig.host.processors[0]
        padded = torch.randn(2 * len(outputs) + 1, self.vocab_size + 3, generator=torch.Generator().manual_seed(0))
        logits_SV = padded.to(dtype)[:, : self.vocab_size]  # rows that don't follow one another
        rows = LogitsRows(
            np.arange(1, len(logits_SV), 2),
            np.array([output.slot for output in outputs]),
            np.array([len(output.tokens) for output in outputs]),
            [output.sequence for output in outputs],
        )
        before = logits_SV.clone()
        first, second = apply(processor, logits_SV, rows), apply(processor, logits_SV, rows)
        assert torch.equal(logits_SV, before), "apply must leave alone the logits that it does not change in place"
        assert first.shape == logits_SV.shape, f"logits of shape {tuple(first.shape)} came out"
        assert first.dtype == torch.float32, f"logits in {first.dtype} came out"
        assert first.is_contiguous(), "logits that are not contiguous came out"
        assert torch.equal(first[::2], before[::2].float()), "rows of others were changed"
        assert torch.equal(first, second), "apply gives something else when it is asked again"

    def test_refused(self) -> None:
        """What can't be served is refused beforehand, in a sentence."""
        for arguments in self.requests.values():
            self.rig().host.check(params_of(arguments))
        for name, arguments in self.refused.items():
            reason = self._refusal(params_of(arguments))
            assert reason is not None, f"{name} was not refused: {arguments}"
            assert reason.endswith("."), f"the refusal of {name} is no sentence: {reason}"

    def _refusal(self, params: SamplingParams) -> str | None:
        try:
            self.rig().host.check(params)
        except RequestError as error:
            return str(error)
        return None

    def test_in_an_engine(self) -> None:
        """The same tokens one by one, side by side, with steps that overlap, and with preemptions."""
        params = [params_of(arguments, max_tokens=NUM_TOKENS) for arguments in self.requests.values()] * 2
        params += [SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)] * 2
        prompts = [[7 + index, *range(20, 25 + index % 5)] for index in range(len(params))]

        def run(max_num_seqs: int, num_kv_blocks: int, *, overlap: bool) -> list[Any]:
            engine = EngineConfig(
                device="cpu", dtype="float32", block_size=4, num_kv_blocks=num_kv_blocks, max_model_len=60,
                overlap=overlap,
            )  # fmt: skip
            scheduler = PluginChoice("fcfs", {"max_num_seqs": max_num_seqs})
            config = Config(engine=engine, plugins={"scheduler": scheduler})
            with LLM.from_config(config, self.registry()) as llm:
                outputs = llm.generate(prompts, params, use_tqdm=False)
                assert (llm.stats.num_preemptions > 0) == (num_kv_blocks < 100)
            for output in outputs:
                assert output.outputs[0].finish_reason != "error", output.outputs[0].stop_reason
            return [output.outputs[0].token_ids for output in outputs]

        expected = run(1, 512, overlap=False)
        for options in ((16, 512, False), (16, 512, True), (16, 20, True)):
            found = run(options[0], options[1], overlap=options[2])
            assert found == expected, f"other tokens with (max_num_seqs, num_kv_blocks, overlap) = {options}"


@dataclass(eq=False)
class Output:
    """A request and what became of it.

    Attributes:
        number: of its prompt.
        sequence: as the processor sees it.
        tokens: all of them, that in flight included.
        logits: what became of the logits of each sampled token.
        pending: the token in flight.
        slot: -1 for none.
        was_changed: whether any of its logits were changed.
    """

    number: int
    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    pending: int | None = None
    slot: int = -1
    was_changed: bool = False

    @property
    def is_done(self) -> bool:
        return self.sequence.is_finished or len(self.tokens) - self.sequence.num_prompt_tokens >= NUM_TOKENS

    def take(self) -> None:
        """The value of the token in flight arrives."""
        if self.pending is not None:
            self.pending = None
            self.sequence.append_token(self.tokens[-1])
            self.tokens = list(self.sequence.token_ids)  # maybe with some that are forced


class Rig:
    """A processor at work: a step, its batch and its slots, without an engine. The "model" is a hash of the tokens."""

    def __init__(self, host: LogitsProcessors, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.host, self.vocab_size, self.eos_token_ids = host, vocab_size, eos_token_ids
        self.free = random.Random(3).sample(range(NUM_SLOTS), NUM_SLOTS)
        self.outputs: list[Output] = []

    def add(self, number: int, params: SamplingParams) -> Output:
        """A new request; its prompt follows from the number."""
        self.host.check(params)
        prompt = random.Random(number).choices(range(self.vocab_size), k=3 + number % 4)
        stops = frozenset(params.stop_token_ids or ()).union(() if params.ignore_eos else self.eos_token_ids)
        sequence = Sequence(str(number), prompt, params, max_tokens=10**6, stop_token_ids=stops)
        begun = self.host.prepare(sequence)
        for _, future in begun:
            future.exception(PATIENCE)
        assert self.host.finish_preparing(sequence, begun), sequence.stop_reason
        self.outputs.append(Output(number, sequence, list(prompt)))
        return self.outputs[-1]

    def wants(self, output: Output) -> bool:
        """Whether the processor wants to change the logits of its next token."""
        slots, positions = np.array([output.slot]), np.array([len(output.tokens)])
        return output.slot >= 0 and bool(self.host.wants(slots, positions).any())

    def step(self, batch: list[Output], *, overlap: bool = False) -> None:
        """Sample a token for each of these; with `overlap` before the last step's are known."""
        before = [output for output in self.outputs if output.pending is not None]
        for output in before:
            if not overlap or output.sequence.needs_values:
                output.take()
        batch = [output for output in batch if not output.is_done]
        for output in batch:
            self.give_slot(output, batch)
        if not batch:
            return
        slots = np.array([output.slot for output in batch])
        positions = np.array([len(output.tokens) for output in batch])
        logits_SV = torch.stack([self._logits(output) for output in batch])
        wanted_PS = self.host.wants(slots, positions)
        assert np.array_equal(wanted_PS, self.host.wants(slots, positions)), "wants says something else the second time"
        changed_SV = logits_SV.clone()
        if (chosen := np.flatnonzero(wanted_PS.any(0))).size:
            changed_SV[chosen] = self.host.apply(
                logits_SV[chosen], slots[chosen], positions[chosen], wanted_PS[:, chosen]
            )
        tokens_S = changed_SV.argmax(-1)
        self.host.observe(slots, tokens_S)
        failures = self.host.take_failures()
        assert not failures, failures[0][1]
        for output, token, old, new in zip(batch, tokens_S.tolist(), logits_SV, changed_SV, strict=True):
            output.was_changed |= not torch.equal(old, new)
            output.logits.append(new)
            output.take()  # the last step's
            if not output.is_done:
                output.tokens.append(token)
                output.pending = token
                output.sequence.num_in_flight += 1
        for output in self.outputs:
            if output not in batch or not overlap or output.sequence.needs_values:
                output.take()
            if output.is_done:
                output.take()
                self.preempt(output)

    def preempt(self, output: Output) -> None:
        """It loses its slot, if it has one."""
        if output.slot >= 0 and output.pending is None:
            self.host.release(output.slot)
            self.free.insert(0, output.slot)
            output.slot = -1

    def give_slot(self, output: Output, batch: list[Output]) -> None:
        """It gets a slot, if it has none and needs one; maybe that of a sequence that is not in the batch."""
        if output.slot < 0 and not output.is_done:
            if not self.free:
                victim = next(o for o in self.outputs if o.slot >= 0 and o not in batch)
                victim.take()
                self.preempt(victim)
            output.slot = self.free.pop()
            self.host.assign(output.slot, output.sequence)

    def _logits(self, output: Output) -> torch.Tensor:
        seed = hash(tuple(output.tokens)) % 2**31
        return torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def apply(processor: LogitsProcessor, logits_SV: torch.Tensor, rows: LogitsRows) -> torch.Tensor:
    """What becomes of logits of any dtype."""
    if not processor.in_place:
        result = processor.apply(logits_SV, rows)
        assert result is not None, "apply must return new logits if it does not change them in place"
        return result
    changed_SV = torch.empty(logits_SV.shape).copy_(logits_SV)
    processor.apply(changed_SV, rows)
    return changed_SV


def some_of(outputs: list[Output], rng: random.Random) -> list[Output]:
    """A batch, in any order."""
    return rng.sample(outputs, rng.randint(1, min(len(outputs), NUM_SLOTS)))


def params_of(arguments: dict[str, Any], **others: Any) -> SamplingParams:
    """Greedy, unless the arguments say otherwise; structured outputs may be given as a dict."""
    arguments = {"temperature": 0.0, "max_tokens": None} | others | arguments
    if isinstance(held := arguments.get("structured_outputs"), dict):
        arguments["structured_outputs"] = StructuredOutputsParams(**held)
    return SamplingParams(**arguments)


def compare(outputs: list[Output], expected: list[Output]) -> None:
    """The same tokens, from the same logits to the last bit."""
    for output, other in zip(outputs, expected, strict=True):
        params = output.sequence.params
        for place, (one, two) in enumerate(zip(output.logits, other.logits, strict=False)):
            assert torch.equal(one, two), f"other logits than alone for token {place} of the output of {params}"
        assert output.tokens == other.tokens, f"other tokens than alone for {params}"
