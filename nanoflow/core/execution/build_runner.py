"""Builds what every rank has: a runner with its part of the model and of the KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanoflow.core.config.engine_config import Config, EngineConfig, PluginChoice, SchedulerConfig
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.contracts.logits_processor import LogitsProcessorContext
from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.contracts.operations import OperationsContext
from nanoflow.core.data.parallel import ParallelContext, Shard
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.execution import cuda_graphs as graphs
from nanoflow.core.execution import kv_cache_size as memory
from nanoflow.core.execution.local_executor import LocalExecutor
from nanoflow.core.execution.model_runner import ModelRunner
from nanoflow.core.execution.num_threads import pick_num_threads
from nanoflow.core.execution.out_of_memory import told_if_too_large
from nanoflow.core.execution.plan import Plan
from nanoflow.core.kernels.register import select_ops
from nanoflow.core.loading import dummy, safetensors
from nanoflow.core.ops import Ops
from nanoflow.core.registry.registry import Registry
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.text.tokenizer import Tokenizer

SMALLER_WEIGHTS = "take a smaller model, engine.dtype=bfloat16, or more GPUs with engine.tensor_parallel_size"
SMALLER_STEP = "lower scheduler.max_num_batched_tokens or scheduler.max_num_seqs"
SMALLER_CACHE = "lower engine.num_kv_blocks, engine.kv_cache_gib or engine.gpu_memory_utilization"

MakeProcessors = Callable[[int, int, Ops], LogitsProcessors]


def no_processors(vocab_size: int, num_slots: int, ops: Ops) -> LogitsProcessors:
    """For a rank that doesn't sample."""
    return LogitsProcessors({}, num_slots)


def processors_maker(
    registry: Registry, plan: Plan, tokenizer: Tokenizer | None = None,
    eos_token_ids: Callable[[int], frozenset[int]] = lambda vocab_size: frozenset(),
) -> MakeProcessors:  # fmt: skip
    """What builds all logits processors that are installed, for V, a number of slots, and what to compute with.

    Args:
        registry, plan: of the engine.
        tokenizer: the checkpoint's.
        eos_token_ids: ids that end a request, below V.
    """

    def make(vocab_size: int, num_slots: int, ops: Ops) -> LogitsProcessors:
        eos = eos_token_ids(vocab_size)
        context = LogitsProcessorContext(vocab_size, num_slots, plan.device, tokenizer, eos, plan.max_model_len, ops)
        return LogitsProcessors(registry.build_by_request("logits_processors", context), num_slots)

    return make


def build_runner(
    config: Config, registry: Registry, plan: Plan, rank_group: RankGroup, wait_for_kernels: Callable[[], None],
    make_processors: MakeProcessors = no_processors,
) -> tuple[ModelRunner, dict[str, str]]:  # fmt: skip
    """What every rank has: a runner with its part of the model and of the cache.

    Args:
        config, registry, plan, rank_group: of the engine.
        wait_for_kernels: called before the first kernel is launched.
        make_processors: builds logits processors for V, so many slots and `ops`; none on ranks that don't sample.

    Returns:
        The runner, and the names of model and attention.
    """
    options, device = config.engine, plan.device
    if device.type == "cuda" and rank_group.parallel.size > 1:
        torch.cuda.set_device(device)
    ops = _operations(config, registry, device)
    rank_group.connect(device, options.one_shot_kib if options.accelerate else 0, ops)
    with told_if_too_large("the weights", device, SMALLER_WEIGHTS):
        model_name, model = _model(config, registry, plan, rank_group.parallel, ops)
    context = _attention_context(plan, options, rank_group.parallel, model)
    entry, attention_options = registry.resolve("attention", pick_attention(config), context)

    def build_attention() -> AttentionBackend:
        return entry.build(attention_options, context)

    num_threads = pick_num_threads(options.num_threads, layer_weights(model), rank_group.parallel.size)

    def runner_with(attention: AttentionBackend, num_kv_blocks: int) -> ModelRunner:
        return ModelRunner(
            model,
            attention,
            device=device,
            block_size=options.block_size,
            max_num_seqs=plan.scheduler_config.max_num_seqs,
            max_model_len=plan.max_model_len,
            num_kv_blocks=num_kv_blocks,
            rank_group=rank_group,
            ops=ops,
            num_threads=num_threads,
        )

    attention = build_attention()
    decodes, tokens = graphs_to_capture(options, plan.scheduler_config, attention, device)
    wait_for_kernels()
    rank_group.barrier()  # from here on ranks compute together
    reserved = 0
    if device.type == "cuda":
        measured = runner_with(build_attention(), num_kv_blocks=0)
        processors = make_processors(model.vocab_size, plan.scheduler_config.max_num_seqs, ops)
        with told_if_too_large("the largest step beside the weights", device, SMALLER_STEP):
            reserved = _reserved_bytes(LocalExecutor(measured, processors), plan, options, decodes, tokens)
        del measured, processors
    num_blocks = rank_group.minimum(memory.pick_num_blocks(options, attention.bytes_per_block, device, reserved))
    size = num_blocks * attention.bytes_per_block / memory.GIB
    with told_if_too_large(f"a KV cache of {num_blocks} blocks ({size:.1f} GiB)", device, SMALLER_CACHE):
        attention.allocate(num_blocks + 1)  # the last block is nobody's
    runner = runner_with(attention, num_kv_blocks=num_blocks)
    if decodes:
        with told_if_too_large("captured steps beside the KV cache", device, SMALLER_CACHE):
            runner.capture(decodes, tokens)
    rank_group.barrier()
    return runner, {"model": model_name, "attention": entry.component.name}


def _operations(config: Config, registry: Registry, device: torch.device) -> Ops:
    sets = registry.build_several("operations", config.plugins.get("operations"), OperationsContext(device))
    extra = [operation for found in sets for operation in found.operations()]
    return select_ops(device, accelerate=config.engine.accelerate, extra=extra)


@torch.inference_mode()
def _model(
    config: Config, registry: Registry, plan: Plan, parallel: ParallelContext, ops: Ops
) -> tuple[str, ModelArch]:
    """The model, weights loaded, and its plugin's name."""
    architectures = plan.hf_config.get("architectures") or []
    entry, model_options = registry.model_for(config.plugins.get("model"), architectures)
    context = ModelContext(plan.hf_config, plan.dtype, plan.device, plan.max_model_len, parallel, ops)
    model: ModelArch = entry.build(model_options, context)
    if config.engine.load_format == "dummy":
        dummy.fill_random(model.weights(), config.engine.seed)
    else:
        safetensors.load_weights(plan.folder, model.weights())
    return entry.component.name, model


def _attention_context(
    plan: Plan, options: EngineConfig, parallel: ParallelContext, model: ModelArch
) -> AttentionContext:
    return AttentionContext(
        num_layers=model.num_layers,
        num_heads=parallel.share(model.num_heads, "query heads").length,
        num_kv_heads=parallel.share_kv_heads(model.num_kv_heads).length,
        head_dim=model.head_dim,
        scale=model.scale,
        windows=model.windows,
        block_size=options.block_size,
        dtype=plan.dtype,
        device=plan.device,
    )


def _reserved_bytes(
    executor: LocalExecutor, plan: Plan, options: EngineConfig, decodes: list[int], tokens: list[int]
) -> int:
    """Bytes of a GPU's memory that steps and graphs take beside weights and cache."""
    captured_bytes, step_bytes = memory.measure_step(executor, plan.scheduler_config)
    width = -(-plan.max_model_len // options.block_size)
    shared_bytes = graphs.buffer_bytes(decodes, tokens, plan.scheduler_config.max_num_seqs, width)
    return step_bytes + memory.graph_bytes(captured_bytes, shared_bytes)


def layer_weights(model: ModelArch) -> int:
    """Numbers in one of a model's layers, of this rank; the vocabulary's are shared out among them."""
    tensors = (w.target if isinstance(w, Shard) else w for w in model.weights().values() if w is not None)
    return sum(tensor.numel() for tensor in tensors) // max(1, model.num_layers)


def pick_attention(config: Config) -> PluginChoice | None:
    """Which attention backend: what the config says, but `auto` is the reference with `engine.accelerate=false`."""
    choice = config.plugins.get("attention")
    is_auto = choice in (None, PluginChoice("auto"))
    return PluginChoice("torch", {"group": False}) if is_auto and not config.engine.accelerate else choice


def graphs_to_capture(
    options: EngineConfig, scheduler_config: SchedulerConfig, attention: AttentionBackend, device: torch.device
) -> tuple[list[int], list[int]]:
    """Batch sizes of decode steps and token counts of other steps to capture, rising; both empty for no graphs."""
    if device.type != "cuda" or not attention.capturable or options.enforce_eager or not options.accelerate:
        return [], []
    decodes = options.graph_sizes or graphs.decode_sizes(scheduler_config.max_num_seqs)
    decodes = sorted(
        {*(size for size in decodes if size < scheduler_config.max_num_seqs), scheduler_config.max_num_seqs}
    )
    tokens = options.graph_tokens
    if tokens is None:
        tokens = graphs.token_sizes(scheduler_config.budget)
    return decodes, sorted(set(tokens)) if attention.capturable_chunks else []
