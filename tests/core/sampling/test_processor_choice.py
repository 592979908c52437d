"""Requests that use no logits processor cost no call of any."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from nanoflow.core.config.sampling_params import SamplingParams, StructuredOutputsParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.registry.registry import Registry
from nanoflow.core.sampling.processor_choice import ProcessorChoice

CHOSEN: list[SamplingParams] = [
    SamplingParams(logit_bias={1: 1.0}), SamplingParams(allowed_token_ids=[1]), SamplingParams(bad_words=["a"]),
    SamplingParams(repetition_penalty=1.1), SamplingParams(presence_penalty=1), SamplingParams(frequency_penalty=1),
    SamplingParams(min_tokens=1), SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"])),
]  # fmt: skip


class Quiet(LogitsProcessor):
    fields: ClassVar[tuple[str, ...] | None] = ("min_p",)

    def uses(self, params: SamplingParams) -> bool:
        raise AssertionError("not to be asked")

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None: ...


class Always(LogitsProcessor):
    def uses(self, params: SamplingParams) -> bool:
        return True

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None: ...


def built_ins() -> dict[str, LogitsProcessor]:
    context = LogitsProcessorContext(64, 2, torch.device("cpu"), None, frozenset({0}), 16)
    return dict(Registry.load().build_by_request("logits_processors", context))


@pytest.mark.parametrize("params", CHOSEN)
def test_the_fields_of_built_ins_ask_for_them(params: SamplingParams) -> None:
    """What any of them uses, its fields say."""
    found = built_ins()
    assert any(processor.uses(params) for processor in found.values())
    for name, processor in found.items():
        assert ProcessorChoice({name: processor}).may_use(params) >= processor.uses(params)


def test_a_plain_request_asks_nobody() -> None:
    choice = ProcessorChoice({**built_ins(), "quiet": Quiet()})
    assert not choice.may_use(SamplingParams(temperature=0.5, top_p=0.9, stop=["a"], logprobs=1))
    assert choice.may_use(SamplingParams(min_p=0.1))
    assert choice.may_use(SamplingParams(logits_processors={"quiet": {}}))


def test_one_that_names_no_fields_is_asked() -> None:
    assert ProcessorChoice({"always": Always()}).may_use(SamplingParams())
