"""How many blocks the KV cache gets: as told, or as many as fit into memory beside all that a step may need."""

from __future__ import annotations

from dataclasses import replace

import torch

from nanoflow.core.config.engine_config import EngineConfig, SchedulerConfig
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.executor import Capabilities
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.execution.free_memory import available_memory
from nanoflow.core.execution.local_executor import LocalExecutor

GIB = 2**30
CPU_KV_CACHE_BYTES = 2 * GIB
CPU_SHARE = 0.25  # of the memory that can be had
GRAPH_BYTES = GIB // 4  # what captured steps take beside their activations, logits and buffers


def pick_num_blocks(options: EngineConfig, bytes_per_block: int, device: torch.device, reserved: int) -> int:
    """Blocks in the KV cache.

    Args:
        options: say how many, how large, or which share of the GPU the engine may use.
        bytes_per_block: over all layers.
        device: whose memory it is. On a CPU the cache takes 2 GiB, or a quarter of what is available.
        reserved: bytes of the GPU's memory to leave free.

    Raises:
        ConfigError: not even one block fits.
    """
    if options.num_kv_blocks is not None:
        return options.num_kv_blocks
    source, on_gpu = "", " or engine.gpu_memory_utilization" if device.type == "cuda" else ""
    if options.kv_cache_gib is not None:
        size = int(options.kv_cache_gib * GIB)
        source = " (engine.kv_cache_gib)"
    elif device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        size = int(free - (1 - options.gpu_memory_utilization) * total) - reserved
    else:
        available = available_memory()
        size = min(CPU_KV_CACHE_BYTES, int(available.size * CPU_SHARE))
        source = f" (2 GiB, or a quarter of {available.size:,} bytes: {available.source})"
    if size < 2 * bytes_per_block:
        raise ConfigError(
            f"There is room for a KV cache of {max(0, size):,} bytes{source}, but it needs two blocks of "
            f"{bytes_per_block:,} bytes each; raise engine.kv_cache_gib{on_gpu}, or free memory."
        )
    return size // bytes_per_block - 1  # the engine keeps one for itself


def size_origin(options: EngineConfig, device_type: str) -> str:
    """Where the number of blocks comes from: the end of a sentence that says how to have more of them."""
    if options.num_kv_blocks is not None:
        return "as engine.num_kv_blocks says; raise it"
    if options.kv_cache_gib is not None:
        return f"which fill engine.kv_cache_gib={options.kv_cache_gib:g}; raise it"
    if device_type == "cuda":
        share = f"engine.gpu_memory_utilization={options.gpu_memory_utilization:g}"
        return f"which fill what weights and steps leave of {share}; raise it, or free memory of the GPU"
    return "which fill 2 GiB or a quarter of the memory that was available, as engine.kv_cache_gib isn't set; set it"


def measure_step(executor: LocalExecutor, config: SchedulerConfig) -> tuple[int, int]:
    """Bytes of GPU memory that the most expensive steps take beside weights and cache: one as it may be captured, and
    one whose sequences ask for everything that sampling can do, the tables of logits processors included.

    Runs these steps: as many sequences and tokens as the scheduler may batch. They share one block, for their content
    doesn't matter. It also compiles the kernels of such steps.
    """
    runner = executor.runner
    everything = SamplingParams(top_p=0.9, top_k=50, min_p=0.01, presence_penalty=1, logit_bias={0: 1.0}, logprobs=1)
    runner.attention.allocate(1)
    before = torch.cuda.memory_allocated(runner.device)
    peaks = []
    for params in (SamplingParams(), everything):
        torch.cuda.reset_peak_memory_stats(runner.device)
        batch = _largest_batch(executor.capabilities, config, params)
        executor.submit(batch).result()
        peaks.append(torch.cuda.max_memory_allocated(runner.device) - before)
        for sequence in batch.sequences:
            executor.release(sequence)
    return peaks[0], peaks[1]


def _largest_batch(capabilities: Capabilities, config: SchedulerConfig, params: SamplingParams) -> Batch:
    # A prompt's log-probabilities are taken for so few tokens at a time that one sequence shows what they need.
    first = replace(params, prompt_logprobs=params.logprobs)
    num_seqs = min(config.max_num_seqs, config.budget)
    batch = Batch()
    left = config.budget
    for index in range(num_seqs):
        length = min(-(-left // (num_seqs - index)), capabilities.max_model_len)
        sequence = Sequence(str(index), [0] * length, params if index else first, max_tokens=1)
        sequence.block_table = [0] * -(-length // capabilities.block_size)
        batch.add(sequence, length)
        left -= length
    return batch


def graph_bytes(step_bytes: int, buffer_bytes: int) -> int:
    """Bytes of GPU memory that graphs take.

    Args:
        step_bytes: what the most expensive captured step takes, logits included; graphs have as much for all of them
            together.
        buffer_bytes: `cuda_graphs.buffer_bytes`; 0 if there are no graphs.
    """
    return step_bytes + buffer_bytes + GRAPH_BYTES if buffer_bytes else 0
