"""From a config to an engine: the one place that knows in which order its parts come to be."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from nanoflow.core.config.engine_config import Config, SchedulerConfig
from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.contracts.contract_checks import CheckedBlockManager, CheckedScheduler
from nanoflow.core.contracts.executor import Capabilities, Executor
from nanoflow.core.contracts.observer import Observer, ObserverContext
from nanoflow.core.contracts.scheduler import Scheduler, SchedulerContext
from nanoflow.core.data.parallel import RankLost
from nanoflow.core.distributed.launch import end_process, form_rank_group
from nanoflow.core.distributed.rank_group import Driver, RankGroup, Worker
from nanoflow.core.engine.engine import Engine
from nanoflow.core.execution.build_runner import MakeProcessors, build_runner, no_processors, processors_maker
from nanoflow.core.execution.kv_cache_size import size_origin
from nanoflow.core.execution.local_executor import LocalExecutor
from nanoflow.core.execution.model_runner import ModelRunner
from nanoflow.core.execution.plan import Plan, make_plan
from nanoflow.core.execution.rank_executor import RankExecutor, worker_loop
from nanoflow.core.execution.reference_executor import ReferenceExecutor
from nanoflow.core.loading.generation_config import eos_token_ids, sampling_params
from nanoflow.core.loading.hub import resolve
from nanoflow.core.registry.registry import Registry
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.text.load_tokenizer import load_tokenizer
from nanoflow.core.text.tokenizer import Tokenizer
from nanoflow.core.warmup.precompile import precompiled

LEAST_BYTES = 2**18  # in the longest prompt in words, which may be cut to fewer tokens; tokenized in under a second


def build_engine(
    config: Config, registry: Registry, clock: Callable[[], float] = time.perf_counter
) -> tuple[Engine, dict[str, str]]:
    """Build all parts of an engine, and start the other ranks that it needs. `clock` is the engine's; seconds.

    If torchrun started this process as another rank than 0, it ends when rank 0 lets go of its engine.

    Returns:
        The engine, and its description: checkpoint, a plugin name for each role, device and dtype.

    Raises:
        NanoflowError: an option, a checkpoint or a plugin that can't be used, in one sentence; or another rank failed.
    """
    rank_group = form_rank_group(config)
    if isinstance(rank_group, Worker):
        run_worker(config, registry, rank_group)
        end_process(0)
    try:
        engine, description = _build_engine(config, registry, rank_group, clock)
    except BaseException as error:
        try:
            if isinstance(error, RuntimeError):  # such as of a sum that a rank was missing for
                rank_group.raise_if_rank_lost()
        finally:
            rank_group.close()
        raise
    if config.engine.freeze_gc and gc.get_freeze_count() == 0:
        # Requests make many objects, so that full collections come often. Each would look at all of PyTorch's, too, for
        # 0.2 seconds in which a GPU is idle; what is there by now is left out of them until `Engine.close`.
        gc.collect()
        gc.freeze()
        engine.unfreezes_gc = True
    return engine, description


def tokenizer_of(folder: Path, other: str | None) -> Tokenizer | None:
    """The checkpoint's tokenizer, or that of another checkpoint; None if the checkpoint has none.

    Raises:
        CheckpointError: the other one has none, or it can't be read.
    """
    if other is None:
        return load_tokenizer(folder)
    tokenizer = load_tokenizer(resolve(other))
    if tokenizer is None:
        raise CheckpointError(f"There is no tokenizer in {other!r:.200}, which engine.tokenizer names.")
    return tokenizer


def run_worker(config: Config, registry: Registry, rank_group: Worker) -> None:
    """Build a rank other than 0, and execute what rank 0 sends until there is no more.

    Raises:
        Exception: whatever went wrong; rank 0 has been told.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rank 0 says it
            runner, _ = _build_runner(config, registry, make_plan(config, registry, rank_group), rank_group)
        worker_loop(runner, rank_group)
    except EOFError:
        return
    except RankLost as error:
        rank_group.report(error)  # rank 0 knows the cause
    except BaseException as error:
        if rank_group.report(error):
            raise


def _build_engine(
    config: Config, registry: Registry, rank_group: RankGroup, clock: Callable[[], float]
) -> tuple[Engine, dict[str, str]]:
    options = config.engine
    plan = make_plan(config, registry, rank_group)
    tokenizer = tokenizer_of(plan.folder, options.tokenizer)
    of_tokenizer = tokenizer.eos_token_id if tokenizer else None

    def eos_token_ids_below(vocab_size: int) -> frozenset[int]:
        return eos_token_ids(plan.folder, plan.hf_config, vocab_size, of_tokenizer)

    make_processors = processors_maker(registry, plan, tokenizer, eos_token_ids_below)
    runner, names = _build_runner(config, registry, plan, rank_group, make_processors)
    processors = make_processors(runner.model.vocab_size, runner.max_num_seqs, runner.ops)
    on_cpu = runner.device.type == "cpu"
    async_scheduling = options.accelerate and not on_cpu if options.overlap is None else options.overlap
    executor = _executor(runner, processors, rank_group, is_reference=not (options.accelerate or async_scheduling))
    capabilities = executor.capabilities
    scheduler, block_manager, policy_names = _policies(config, registry, plan.scheduler_config, capabilities)
    observers = _observers(config, registry, plan.scheduler_config, capabilities, clock)
    from_checkpoint = options.generation_config == "auto"
    if tokenizer is not None:
        longest = max(LEAST_BYTES, capabilities.max_model_len * tokenizer.longest_token())
        tokenizer.max_bytes = longest if options.max_prompt_bytes is None else options.max_prompt_bytes
    engine = Engine(
        executor=executor,
        scheduler=scheduler,
        block_manager=block_manager,
        processors=processors,
        tokenizer=tokenizer,
        vocab_size=capabilities.vocab_size,
        max_model_len=capabilities.max_model_len,
        eos_token_ids=eos_token_ids_below(capabilities.vocab_size),
        default_params=sampling_params(plan.folder) if from_checkpoint else SamplingParams(),
        seed=options.seed,
        depth=1 if async_scheduling else 0,
        clock=clock,
        observers=observers,
        cache_origin=", " + size_origin(options, capabilities.device_type),
        limits=options,
    )
    return engine, {
        "checkpoint": str(config.checkpoint),
        **names,
        **policy_names,
        "device": capabilities.device,
        "dtype": str(plan.dtype).removeprefix("torch."),
    }


def _executor(
    runner: ModelRunner, processors: LogitsProcessors, rank_group: RankGroup, *, is_reference: bool
) -> Executor:
    if isinstance(rank_group, Driver):
        return RankExecutor(runner, processors, rank_group)
    return ReferenceExecutor(runner, processors) if is_reference else LocalExecutor(runner, processors)


def _policies(
    config: Config, registry: Registry, scheduler_config: SchedulerConfig, capabilities: Capabilities
) -> tuple[Scheduler, BlockManager, dict[str, str]]:
    """Scheduler and block manager, checked if `engine.debug` says so, and their names."""
    blocks_entry, blocks_options = registry.resolve("block_manager", config.plugins.get("block_manager"))
    block_manager = blocks_entry.build(
        blocks_options, BlockManagerContext(capabilities.num_kv_blocks, capabilities.block_size)
    )
    if config.engine.debug:
        block_manager = CheckedBlockManager(block_manager, str(blocks_entry))
    entry, _ = registry.resolve("scheduler", config.plugins.get("scheduler"))
    scheduler = entry.build(scheduler_config, SchedulerContext(block_manager, capabilities.max_model_len))
    if config.engine.debug:
        scheduler = CheckedScheduler(scheduler, str(entry), scheduler_config, block_manager)
    names = {"scheduler": entry.component.name, "block_manager": blocks_entry.component.name}
    return scheduler, block_manager, names


def _observers(
    config: Config, registry: Registry, scheduler_config: SchedulerConfig, capabilities: Capabilities,
    clock: Callable[[], float],
) -> list[Observer]:  # fmt: skip
    context = ObserverContext(
        clock, capabilities.num_kv_blocks, capabilities.block_size, scheduler_config.max_num_seqs,
        scheduler_config.budget,
    )  # fmt: skip
    return registry.build_several("observers", config.plugins.get("observers"), context)


def _build_runner(
    config: Config, registry: Registry, plan: Plan, rank_group: RankGroup,
    make_processors: MakeProcessors = no_processors,
) -> tuple[ModelRunner, dict[str, str]]:  # fmt: skip
    with precompiled(config, plan, rank_group) as wait:
        return build_runner(config, registry, plan, rank_group, wait, make_processors)
