"""Plugins with one bug each, made of the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.continuous_scheduler import ContinuousScheduler
from nanoflow.core.contracts.logits_processor import LogitsRows
from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.contracts.scheduler import Scheduler, SchedulerContext
from nanoflow.core.contracts.waiting_line import Place
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.parallel import Group
from nanoflow.core.data.reasons import WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import Component, NoOptions
from nanoflow.plugins.attention.torch.backend import TorchAttention
from nanoflow.plugins.block_managers.plain import PlainBlockManager
from nanoflow.plugins.block_managers.prefix import PrefixBlockManager
from nanoflow.plugins.block_managers.prefix_cache import Key
from nanoflow.plugins.models.qwen3 import Qwen3
from nanoflow.plugins.schedulers.fcfs import FCFSScheduler
from tests.plugins.logits_processors.at_most import AtMost, Newest

# ---- schedulers


@contextmanager
def patched_free(blocks: BlockManager, free: Callable[[Sequence], None]) -> Iterator[None]:
    """With another `free` meanwhile."""
    blocks.free = free  # type: ignore[method-assign]
    try:
        yield
    finally:
        del blocks.free


class LeaksOnAbort(FCFSScheduler):
    def abort(self, request_id: str) -> Sequence | None:
        with patched_free(self.blocks, lambda sequence: None):
            return super().abort(request_id)


class LosesABlockOnPreemption(FCFSScheduler):
    def schedule(self) -> Batch | None:
        free = self.blocks.free

        def free_all_but_one(sequence: Sequence) -> None:
            sequence.block_table.pop()
            free(sequence)

        with patched_free(self.blocks, free_all_but_one):
            return super().schedule()


class ShortestFirst(ContinuousScheduler):
    """Without ageing, a long prompt never gets its turn."""

    def rank(self, sequence: Sequence) -> int:
        return sequence.num_prompt_tokens


class OverBudget(FCFSScheduler):
    def __init__(self, config: SchedulerConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.max_num_batched_tokens += 1


class TooMany(FCFSScheduler):
    def __init__(self, config: SchedulerConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.max_num_seqs += 1


class ChunksFirst(FCFSScheduler):
    def schedule(self) -> Batch | None:
        batch = super().schedule()
        for entries in (batch.sequences, batch.starts, batch.num_tokens, batch.samples) if batch else ():
            entries.reverse()
        return batch


class HidesPreemptions(FCFSScheduler):
    def schedule(self) -> Batch | None:
        batch = super().schedule()
        if batch is not None:
            batch.preempted = []
        return batch


class LooksAtValues(ContinuousScheduler):
    def rank(self, sequence: Sequence) -> int:
        """Whether some request, so far, has an answer with an odd sum."""
        return sum(sum(place.sequence.output_token_ids) for place in self.unfinished.values()) % 2


class EndsTwice(FCFSScheduler):
    def update(self, batch: Batch) -> list[Sequence]:
        return super().update(batch) * 2


class Stalls(FCFSScheduler):
    """Admits nobody whose prompt does not fit into one step."""

    def candidates(self) -> Iterable[Place]:
        return [p for p in super().candidates() if p.sequence.num_uncomputed_tokens <= self.max_num_batched_tokens]


class BlamesTheBudget(FCFSScheduler):
    def wait_reason(self) -> WaitReason | None:
        reason = super().wait_reason()
        return reason and replace(reason, cause=WaitCause.NO_BUDGET, needed=1, free=0)


class MiscountsTheLine(FCFSScheduler):
    def wait_reason(self) -> WaitReason | None:
        reason = super().wait_reason()
        return reason and replace(reason, num_behind=reason.num_behind + 1)


class BlamesTheVictim(FCFSScheduler):
    def schedule(self) -> Batch | None:
        batch = super().schedule()
        if batch is not None:
            batch.preempt_reasons = [replace(r, needed_by=r.request_id) for r in batch.preempt_reasons]
        return batch


# ---- block managers


class LeaksABlock(PrefixBlockManager):
    def free(self, sequence: Sequence) -> None:
        if len(sequence.block_table) > 2:
            sequence.block_table.pop()
        super().free(sequence)


class OneTokenShort(PlainBlockManager):
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        return super().allocate(sequence, num_tokens - 1)


class HandsOutTwice(PlainBlockManager):
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        before = len(self.free_blocks)
        done = super().allocate(sequence, num_tokens)
        if len(self.free_blocks) < before:
            self.free_blocks.append(sequence.block_table[-1])
        return done


class TrustsDigests(PrefixBlockManager):
    def _find(self, key: Key, parent_id: int) -> int | None:
        return self.cached.get(key.digest)


class SkipsTheLastToken(PrefixBlockManager):
    def _num_skippable_blocks(self, sequence: Sequence) -> int:
        return len(sequence.token_ids) // self.block_size


class KeepsWhatItRefused(PlainBlockManager):
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        if not (done := super().allocate(sequence, num_tokens)) and self.free_blocks:
            sequence.block_table.append(self.free_blocks.pop())
        return done


class ForgetsIdleBlocks(PrefixBlockManager):
    @property
    def num_free_blocks(self) -> int:
        return len(self.blank)


class PromisesTooMuch(PrefixBlockManager):
    def match(self, sequence: Sequence) -> int:
        return min(super().match(sequence) + self.block_size, (sequence.num_tokens - 1) // self.block_size)


class IgnoresIdentities(PrefixBlockManager):
    def _keys(self, sequence: Sequence, num_blocks: int) -> list[Key]:
        sequence.cache_identity = b""
        return super()._keys(sequence, num_blocks)


class LooksUpAgain(PrefixBlockManager):
    def match(self, sequence: Sequence) -> int:
        sequence.prefix_match = None
        return super().match(sequence)


class EvictsSilently(PrefixBlockManager):
    def _evict(self) -> int:
        told, self.on_evict = self.on_evict, None
        block_id = super()._evict()
        self.on_evict = told
        return block_id


class TellsOfEveryFree(PrefixBlockManager):
    def free(self, sequence: Sequence) -> None:
        blocks = list(sequence.block_table)
        super().free(sequence)
        for block in blocks if self.on_evict else ():
            self.on_evict(block)


class NeverFinds(PrefixBlockManager):
    def commit(self, sequence: Sequence) -> None:
        pass


# ---- attention backends


class SlotOffByOne(TorchAttention):
    def store(self, layer: int, key_TKH: torch.Tensor, value_TKH: torch.Tensor) -> None:
        slots = self.slots_T
        self.slots_T = (slots + 1) % (self.keys[0].numel() // (key_TKH.shape[1] * key_TKH.shape[2]))
        super().store(layer, key_TKH, value_TKH)
        self.slots_T = slots


def with_context_lens(change: Callable[[Any, int], Any]) -> type[TorchAttention]:
    class Broken(TorchAttention):
        def plan(self, inputs: AttentionInput) -> None:
            super().plan(replace(inputs, context_lens=change(inputs.context_lens, self.context.block_size)))

    return Broken


MissesTheNewest = with_context_lens(lambda lens, size: (lens - 1).clip(1))
ReadsWholeBlocks = with_context_lens(lambda lens, size: -(-lens // size) * size)


class MixesUpKVHeads(TorchAttention):
    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(self.context.num_heads).view(self.heads_per_kv_head, -1).T.flatten()
        return super().attend(layer, query_TNH[:, heads])[:, heads.argsort()]


class OwnScale(TorchAttention):
    def __init__(self, config: NoOptions, context: AttentionContext) -> None:
        super().__init__(config, replace(context, scale=context.head_dim**-0.5))


class NoWindows(TorchAttention):
    def __init__(self, config: NoOptions, context: AttentionContext) -> None:
        super().__init__(config, replace(context, windows=()))


class OneCacheForAll(TorchAttention):
    def allocate(self, num_blocks: int) -> None:
        super().allocate(num_blocks)
        self.values = self.values[:1] * len(self.values)


class Drifts(TorchAttention):
    drift = 0.0

    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        self.drift += 1e-6
        return super().attend(layer, query_TNH) + self.drift


class LeavesRowsOut(TorchAttention):
    """The last row is whatever was in memory."""

    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        out = torch.empty(query_TNH.shape, dtype=query_TNH.dtype)
        out[:-1] = super().attend(layer, query_TNH)[:-1]
        return out


# ---- models


def altered(**changes: Any) -> type[ModelArch]:
    """Qwen3 that reads its config wrongly."""

    class Broken(Qwen3):
        def __init__(self, context: ModelContext) -> None:
            super().__init__(replace(context, hf_config={**context.hf_config, **changes}))

    return Broken


WrongRope = altered(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
WrongEps = altered(rms_norm_eps=1e-2)


class RestartsPositions(Qwen3):
    """Right for whole prompts alone."""

    def forward(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: AttentionBackend) -> Any:
        return super().forward(input_ids_T, torch.arange(len(positions_T)), attention)


class AlwaysTheFirstCache(Qwen3):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context)
        for layer in self.layers:
            layer.self_attn.layer = 0


class ForgetsAWeight(Qwen3):
    def weights(self) -> Any:
        return {name: target for name, target in super().weights().items() if "q_norm" not in name}


class LoadsIntoACopy(Qwen3):
    def weights(self) -> Any:
        targets = super().weights()
        name = next(name for name in targets if name.endswith("o_proj.weight"))
        return targets | {name: targets[name].clone()}


class KeepsSums(Group):
    """Of a rank that never hears of the others' parts."""

    def __init__(self, group: Group) -> None:
        self.all_gather, self.broadcast = group.all_gather, group.broadcast  # type: ignore[method-assign]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def broadcast(self, x: torch.Tensor) -> None:
        raise NotImplementedError


class AddsNothingUp(Qwen3):
    def __init__(self, context: ModelContext) -> None:
        if (group := context.parallel.group) is not None:
            context = replace(context, parallel=replace(context.parallel, group=KeepsSums(group)))
        super().__init__(context)


# ---- logits processors


class ByRow(AtMost):
    """Takes the row of the logits for the slot."""

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        super().apply(logits_SV, replace(rows, slots=rows.indices))


class LeavesCountsBehind(AtMost):
    def assign(self, slot: int, sequence: Sequence) -> None:
        counts = self.counts_RV[slot].clone()
        super().assign(slot, sequence)
        self.counts_RV[slot] += counts


class ForgetsOnPreemption(AtMost):
    def assign(self, slot: int, sequence: Sequence) -> None:
        super().assign(slot, sequence)
        self.counts_RV[slot] = 0


class CountsInApply(AtMost):
    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        super().apply(logits_SV, rows)
        self.counts_RV[rows.slots] += 1


class ChangesAllRows(AtMost):
    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        super().apply(logits_SV, rows)
        logits_SV += 1


class ChangesWhatIsNotItsOwn(AtMost):
    in_place = False

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> Any:
        logits_SV[rows.indices] += 1
        return logits_SV.float()


class TakesAnything(AtMost):
    def check(self, params: SamplingParams) -> None:
        pass


class DoesNotWait(Newest):
    """Looks at the newest token, though it may not be there yet."""

    needs_values = False

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        for index, sequence in zip(rows.indices, rows.sequences, strict=True):
            logits_SV[index, sequence.token_ids[-1]] = -torch.inf


class CountsForAll(AtMost):
    """One table for all that are in the batch."""

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        self.counts_RV[:, tokens_S] += 1


class DoesNothing(AtMost):
    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        pass


class Raises(AtMost):
    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        raise ZeroDivisionError("division by zero")


def component(broken: type) -> Component:
    """The broken plugin as its package would describe it."""
    if issubclass(broken, ModelArch):
        return Component("broken", lambda config, context: broken(context), architectures=("Qwen3ForCausalLM",))
    config = SchedulerConfig if issubclass(broken, Scheduler) else NoOptions
    return Component("broken", broken, config=config)
