"""The engine beside transformers' `generate` on this machine's CPU, and the engine's own cost a step.

    python benchmarks/cpu.py

Bundled checkpoint, float32, greedy, and the tokens of both are compared. Each figure is the median of several runs, and
the runs of the two take turns, so that a change in the machine's load meets both.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from nanoflow import LLM, SamplingParams
from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.block_manager import BlockManagerContext
from nanoflow.core.contracts.model import ModelArch
from nanoflow.core.contracts.scheduler import SchedulerContext
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.engine.engine import Engine
from nanoflow.core.execution.local_executor import LocalExecutor
from nanoflow.core.execution.model_runner import ModelRunner
from nanoflow.core.loading import hub
from nanoflow.core.ops import Ops
from nanoflow.core.registry.component import NoOptions
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.plugins.block_managers.prefix import PrefixBlockManager
from nanoflow.plugins.schedulers.fcfs import FCFSScheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {repeats} runs\n")
    compare(repeats)
    print()
    host_time(repeats)


def compare(repeats: int) -> None:
    """One prompt, 32 ragged prompts with equal outputs, and 32 with ragged outputs too."""
    folder = hub.resolve("bard")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = LLM(dtype="float32", block_manager="plain")  # no prefix cache: repeats must do all the work again
    generator = random.Random(0)
    vocab_size = reference.config.vocab_size
    ragged = [[generator.randrange(1, vocab_size) for _ in range(generator.randint(16, 384))] for _ in range(32)]
    lengths = [generator.randint(16, 256) for _ in ragged]
    workloads = {
        "1 prompt of 64 tokens, 128 new": ([ragged[0][:64]], [128]),
        "32 prompts of 16-384, 128 new each": (ragged, [128] * 32),
        "32 prompts of 16-384, 16-256 new": (ragged, lengths),
    }
    print(f"{'':38}{'nanoflow':>12}{'transformers':>14}{'ratio':>8}   same tokens")
    for name, (prompts, num_new) in workloads.items():
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in num_new]
        ours, theirs = alternate(
            lambda prompts=prompts, params=params: [o["token_ids"] for o in llm.generate(prompts, params, False)],
            lambda prompts=prompts, num_new=num_new: generate(reference, prompts, num_new),
            repeats,
        )
        same = ours[1] == theirs[1]
        print(f"{name:38}{ours[0]:>11.3f}s{theirs[0]:>13.3f}s{theirs[0] / ours[0]:>8.2f}   {same}")


def generate(model: torch.nn.Module, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
    """transformers' batched greedy generation, prompts padded on the left; as many new tokens as the longest needs."""
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        out = model.generate(
            input_ids, attention_mask=mask, max_new_tokens=max(num_new), min_new_tokens=max(num_new), do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return [row[:n] for row, n in zip(out[:, longest:].tolist(), num_new, strict=True)]


def alternate(first: Callable, second: Callable, repeats: int) -> list[tuple[float, list[list[int]]]]:
    """Median seconds and last result of each of two functions, called in turns after one call to warm up."""
    times: list[list[float]] = [[], []]
    results = [first(), second()]
    for _ in range(repeats):
        for index, function in enumerate((first, second)):
            start = time.perf_counter()
            results[index] = function()
            times[index].append(time.perf_counter() - start)
    return [(statistics.median(t), result) for t, result in zip(times, results, strict=True)]


class NullAttention(AttentionBackend):
    """Attention that is never asked for anything."""

    bytes_per_block = 0
    slot_mapping_T = torch.empty(0)

    def allocate(self, num_blocks: int) -> None: ...

    def plan(self, inputs: object) -> None: ...

    def cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class NullModel(ModelArch):
    """A model that costs next to nothing: every token is followed by token 1."""

    vocab_size = 2

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        return positions

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 1.0]]).expand(len(hidden), 2)

    def weights(self) -> dict[str, torch.Tensor | None]:
        return {}


def host_time(repeats: int, prompt_len: int = 128, num_new: int = 128) -> None:
    """Cost of a decode step without its model: scheduling, block management, building inputs, taking results."""
    print("Host time of a decode step (a model that costs nothing), microseconds")
    print(f"{'sequences':>12}{'a step':>12}{'a sequence':>14}")
    for num_seqs in (16, 64, 256, 1024):
        medians = [statistics.median(decode_steps(num_seqs, prompt_len, num_new)) for _ in range(repeats)]
        step = statistics.median(medians) * 1e6
        print(f"{num_seqs:>12}{step:>12.0f}{step / num_seqs:>14.2f}")


def decode_steps(num_seqs: int, prompt_len: int, num_new: int) -> list[float]:
    """Seconds of each step in which all sequences decode."""
    size = 16
    num_blocks = num_seqs * -(-(prompt_len + num_new) // size)
    blocks = PrefixBlockManager(NoOptions(), BlockManagerContext(num_blocks, size))
    config = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=max(8192, num_seqs))
    runner = ModelRunner(
        NullModel(), NullAttention(), device=torch.device("cpu"), block_size=size, max_num_seqs=num_seqs,
        max_model_len=1024, num_kv_blocks=num_blocks, rank_group=RankGroup(ParallelContext(), None), ops=Ops(),
    )  # fmt: skip
    processors = LogitsProcessors({}, num_seqs)
    engine = Engine(
        executor=LocalExecutor(runner, processors), scheduler=FCFSScheduler(config, SchedulerContext(blocks, 1024)),
        block_manager=blocks, processors=processors, tokenizer=None, vocab_size=2**20, max_model_len=1024,
        eos_token_ids=frozenset(), default_params=SamplingParams(), seed=0, depth=0,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(2**20, size=(num_seqs, prompt_len)).tolist()
    for index, prompt in enumerate(tokens):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0, max_tokens=num_new))
    times = []
    while engine.has_unfinished:
        decoded = engine.stats.num_decode_tokens
        start = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - start
        if engine.stats.num_decode_tokens - decoded == num_seqs and engine.has_unfinished:
            times.append(elapsed)
    return times


if __name__ == "__main__":
    main()
