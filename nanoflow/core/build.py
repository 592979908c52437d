"""From a config to an engine: the one place that knows in which order its parts come to be."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanoflow.core import checkpoint, graphs, memory
from nanoflow.core.ahead import compiled_ahead
from nanoflow.core.checked import CheckedBlockManager, CheckedScheduler
from nanoflow.core.config import Config, EngineConfig, SamplingParams, SchedulerConfig
from nanoflow.core.engine import Engine
from nanoflow.core.errors import CheckpointError, ConfigError
from nanoflow.core.interfaces import (
    AttentionBackend,
    AttentionContext,
    BlockManagerContext,
    ModelArch,
    ModelContext,
    SchedulerContext,
)
from nanoflow.core.launch import end_process, form_team, rank_device
from nanoflow.core.registry import Registry
from nanoflow.core.runner import ModelRunner
from nanoflow.core.team import Follower, Leader, Team
from nanoflow.core.tokenizer import Tokenizer

# Tokens in a batch. A GPU is busier with larger chunks, and there they are short; a CPU is busy with any.
GPU_TOKENS, CPU_TOKENS = 8192, 2048


@dataclass(frozen=True)
class Plan:
    """What is known of an engine before anything takes memory.

    Attributes:
        folder: the checkpoint's.
        hf_config: its config.json.
        device: of this rank.
        dtype: of parameters, activations and the KV cache.
        max_model_len: most tokens in a sequence.
        limits: the scheduler's options, with its budget set.
    """

    folder: Path
    hf_config: HFConfig
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    limits: SchedulerConfig


def build_engine(config: Config, registry: Registry) -> tuple[Engine, dict[str, str]]:
    """Build all parts of an engine, and start the other ranks that it needs.

    If torchrun started this process as another rank than 0, it ends when rank 0 lets go of its engine.

    Returns:
        The engine, and what it is made of: checkpoint, a plugin name for each role, device and dtype.

    Raises:
        NanoflowError: an option, a checkpoint or a plugin that can't be used, in one sentence; or another rank failed.
    """
    team = form_team(config)
    if isinstance(team, Follower):
        follow(config, registry, team)
        end_process(0)
    try:
        engine, made_of = _build_engine(config, registry, team)
    except BaseException as error:
        try:
            if isinstance(error, RuntimeError):  # such as of a sum that a rank was missing for
                team.explain()
        finally:
            team.close()
        raise
    if engine.runner.device.type == "cuda":
        # Requests make many objects, so that full collections come often. Each would look at all of PyTorch's, too, for
        # 0.2 seconds in which the GPU is idle; what is there by now is left out of them until `Engine.close`.
        gc.collect()
        gc.freeze()
    return engine, made_of


def follow(config: Config, registry: Registry, team: Follower) -> None:
    """Build a rank other than 0, and compute what rank 0 sends until there is no more.

    Raises:
        Exception: whatever went wrong; rank 0 has been told.
    """
    try:
        runner = _build_runner(config, registry, make_plan(config, registry, team), team)[0]
        while True:
            runner.follow(team.receive())
    except EOFError:
        return
    except BaseException as error:
        if team.report(error):
            raise


def make_plan(config: Config, registry: Registry, team: Team) -> Plan:
    """Read the checkpoint's config, and choose what follows from it; see `build_engine` for what it raises."""
    options = config.engine
    folder = checkpoint.resolve(config.checkpoint)
    hf_config = HFConfig(checkpoint.read_config(folder))
    device = rank_device(pick_device(options.device), team)
    limits: SchedulerConfig = registry.resolve("scheduler", config.scheduler)[1]
    if limits.max_num_batched_tokens is None:
        budget = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
        limits = replace(limits, max_num_batched_tokens=max(budget, limits.max_num_seqs))
    dtype = pick_dtype(options.dtype, hf_config, device)
    model_entry, _ = registry.model_for(config.model, hf_config.get("architectures") or [])
    max_model_len = pick_max_model_len(options.max_model_len, hf_config[model_entry.component.positions_key])
    return Plan(folder, hf_config, device, dtype, max_model_len, limits)


def _build_engine(config: Config, registry: Registry, team: Team) -> tuple[Engine, dict[str, str]]:
    options = config.engine
    plan = make_plan(config, registry, team)
    runner, num_blocks, names = _build_runner(config, registry, plan, team)
    if isinstance(team, Leader):
        runner.send = team.send
    blocks_entry, blocks_options = registry.resolve("block_manager", config.block_manager)
    block_manager = blocks_entry.build(blocks_options, BlockManagerContext(num_blocks, options.block_size))
    if options.debug:
        block_manager = CheckedBlockManager(block_manager, str(blocks_entry))
    scheduler_entry, _ = registry.resolve("scheduler", config.scheduler)
    scheduler = scheduler_entry.build(plan.limits, SchedulerContext(block_manager, plan.max_model_len))
    if options.debug:
        scheduler = CheckedScheduler(scheduler, str(scheduler_entry), plan.limits, block_manager)

    tokenizer = Tokenizer.load(plan.folder)
    vocab_size = runner.model.vocab_size
    of_tokenizer = tokenizer.eos_token_id if tokenizer else None
    eos_token_ids = checkpoint.eos_token_ids(plan.folder, plan.hf_config, vocab_size, of_tokenizer)
    overlap = plan.device.type != "cpu" if options.overlap is None else options.overlap
    from_checkpoint = options.generation_config == "auto"
    engine = Engine(
        runner=runner,
        scheduler=scheduler,
        block_manager=block_manager,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        max_model_len=plan.max_model_len,
        eos_token_ids=eos_token_ids,
        default_params=checkpoint.sampling_params(plan.folder) if from_checkpoint else SamplingParams(),
        seed=options.seed,
        depth=1 if overlap else 0,
    )
    return engine, {
        "checkpoint": str(config.checkpoint),
        **names,
        "scheduler": scheduler_entry.component.name,
        "block_manager": blocks_entry.component.name,
        "device": device_name(plan.device, team.parallel.size),
        "dtype": str(plan.dtype).removeprefix("torch."),
    }


def _build_runner(
    config: Config, registry: Registry, plan: Plan, team: Team
) -> tuple[ModelRunner, int, dict[str, str]]:  # fmt: skip
    with compiled_ahead(config, plan, team) as wait:
        return build_runner(config, registry, plan, team, wait)


def build_runner(
    config: Config, registry: Registry, plan: Plan, team: Team, wait_for_kernels: Callable[[], None]
) -> tuple[ModelRunner, int, dict[str, str]]:  # fmt: skip
    """What every rank has: a runner with its part of the model and of the cache.

    Args:
        config, registry, plan, team: of the engine.
        wait_for_kernels: called before the first kernel is launched.

    Returns:
        The runner, the number of blocks that the block manager may hand out, and the names of model and attention.
    """
    options, device, limits = config.engine, plan.device, plan.limits
    if device.type == "cuda" and team.parallel.size > 1:
        torch.cuda.set_device(device)
    team.connect(device, options.one_shot_kib)
    parallel = team.parallel
    model_entry, model_options = registry.model_for(config.model, plan.hf_config.get("architectures") or [])
    model_context = ModelContext(plan.hf_config, plan.dtype, device, plan.max_model_len, parallel)
    with torch.inference_mode():
        model: ModelArch = model_entry.build(model_options, model_context)
        if options.load_format == "dummy":
            checkpoint.fill_random(model.weights(), options.seed)
        else:
            checkpoint.load_weights(plan.folder, model.weights())

    attention_context = AttentionContext(
        num_layers=model.num_layers,
        num_heads=parallel.share(model.num_heads, "query heads").length,
        num_kv_heads=parallel.share_kv_heads(model.num_kv_heads).length,
        head_dim=model.head_dim,
        scale=model.scale,
        windows=model.windows,
        block_size=options.block_size,
        dtype=plan.dtype,
        device=device,
    )
    attention_entry, attention_options = registry.resolve("attention", config.attention, attention_context)

    def build_attention() -> AttentionBackend:
        return attention_entry.build(attention_options, attention_context)

    def runner_with(attention: AttentionBackend, padding_block: int) -> ModelRunner:
        return ModelRunner(
            model,
            attention,
            device=device,
            block_size=options.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_model_len=plan.max_model_len,
            padding_block=padding_block,
            team=team,
        )

    attention = build_attention()
    decodes, tokens = graphs_to_capture(options, limits, attention, device)
    wait_for_kernels()
    team.least(0)  # from here on ranks compute together
    reserved = 0
    if device.type == "cuda":
        captured_bytes, step_bytes = memory.measure_step(runner_with(build_attention(), 0), limits, plan.max_model_len)
        rows = graphs.num_rows(decodes, tokens, limits.max_num_seqs)
        reserved = step_bytes + memory.graph_bytes(captured_bytes, rows, model.vocab_size // parallel.size, plan.dtype)
    num_blocks = team.least(memory.pick_num_blocks(options, attention.bytes_per_block, device, reserved))
    try:
        attention.allocate(num_blocks + 1)  # the last block is nobody's
    except (MemoryError, torch.OutOfMemoryError):
        size = num_blocks * attention.bytes_per_block / memory.GIB
        raise ConfigError(
            f"There is no memory for a KV cache of {num_blocks} blocks ({size:.1f} GiB); lower engine.num_kv_blocks."
        ) from None
    runner = runner_with(attention, padding_block=num_blocks)
    if decodes:
        runner.capture(decodes, tokens)
    team.least(0)
    return runner, num_blocks, {"model": model_entry.component.name, "attention": attention_entry.component.name}


def graphs_to_capture(
    options: EngineConfig, limits: SchedulerConfig, attention: AttentionBackend, device: torch.device
) -> tuple[list[int], list[int]]:
    """Batch sizes of decode steps and token counts of other steps to capture, rising; both empty for no graphs."""
    if device.type != "cuda" or not attention.capturable or options.enforce_eager:
        return [], []
    decodes = options.graph_sizes or graphs.decode_sizes(limits.max_num_seqs)
    decodes = sorted({*(size for size in decodes if size < limits.max_num_seqs), limits.max_num_seqs})
    tokens = options.graph_tokens
    if tokens is None:
        tokens = graphs.token_sizes(limits.budget)
    return decodes, sorted(set(tokens)) if attention.capturable_chunks else []


class HFConfig(dict[str, Any]):
    """A checkpoint's config.json, in which a key that the model needs and that is absent is the user's to mend."""

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"The checkpoint's config.json has no {key!r}, which its architecture needs.")


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"engine.device={name} asks for a GPU, but there are {torch.cuda.device_count()} here; use cpu."
        )
    return device


def pick_dtype(name: str, hf_config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The dtype of that name. `auto`: float32 on a CPU, else the checkpoint's, where float32 becomes bfloat16."""
    if name == "auto":
        stored = hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16"
        name = "float32" if device.type == "cpu" else "bfloat16" if stored == "float32" else stored
    return getattr(torch, name)


def pick_max_model_len(wanted: int | None, limit: int) -> int:
    """The longest sequence, prompt and output together, of a model for `limit` tokens.

    Raises:
        ConfigError: more than the model has positions for.
    """
    if wanted is not None and wanted > limit:
        raise ConfigError(f"engine.max_model_len is {wanted}, but the checkpoint serves at most {limit} tokens.")
    return wanted or limit


def device_name(device: torch.device, count: int = 1) -> str:
    """What to call so many of the device in reports."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return name if count == 1 else f"{count} x {name}"
