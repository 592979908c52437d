"""Structured output on a GPU: masks, and outputs that are valid with graphs, without, and overlapped."""

from __future__ import annotations

import json

import pytest
import torch

from nanoflow import LLM, SamplingParams, StructuredOutputsParams
from nanoflow.core.sampling.logits import mask_bits
from tests.core.schemas import matches
from tests.plugins.logits_processors.test_grammar import PERSON


def test_masks_as_on_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (64, 1 + 4749), generator=generator, dtype=torch.int64).int()
    rows = torch.randperm(100, generator=generator)[:64].int()
    logits = torch.randn(100, 151_936, generator=generator).bfloat16()
    on_device = logits.cuda()
    mask_bits(logits, rows, words[:, 1:])
    words, rows = words.cuda(), rows.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask_bits(on_device, rows, words[:, 1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_device.cpu(), logits)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_outputs_are_valid(enforce_eager: bool, overlap: bool) -> None:
    held = StructuredOutputsParams(json=PERSON)
    with LLM(device="cuda", num_kv_blocks=512, max_num_seqs=16, enforce_eager=enforce_eager, overlap=overlap) as llm:
        params = [
            SamplingParams(seed=seed, max_tokens=300, structured_outputs=held if seed % 2 else None)
            for seed in range(24)
        ]  # fmt: skip
        outputs = llm.generate(["HAMLET:"] * len(params), params, use_tqdm=False)
    for output in outputs[1::2]:
        assert matches(PERSON, json.loads(output["text"]))
