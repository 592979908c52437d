"""What becomes of options that vLLM's and nano-vLLM's `LLM` take and that are called otherwise here, or aren't there.

One table, `VLLM_OPTIONS`; `docs/from-vllm.md` shows it. An option of the engine or of a chosen plugin is never looked
up in it, except for other ways to spell its value (`SPELLINGS`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoflow.core.config.errors import ConfigError, shown
from nanoflow.core.config.fields import is_number

GIB = 2**30


@dataclass(frozen=True)
class Renamed:
    """An option that is called `name` here; `values` says what its values are here, and others stay what they are."""

    name: str
    values: Mapping[Any, Any] | Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Ignored:
    """An option that changes no output; a warning says `why` nothing is to do for it. Values in `unset` need none."""

    why: str
    unset: tuple[Any, ...] = (None,)


@dataclass(frozen=True)
class Unsupported:
    """An option that would matter and is not there; `instead` says what is. Values in `unset` ask for nothing."""

    instead: str = ""
    unset: tuple[Any, ...] = (None,)


Fate = Renamed | Ignored | Unsupported

OFF = (None, False)
ONE = (None, 1)
EMPTY = (None, {}, [])
NO_LORA = Unsupported("merge the adapter into the checkpoint", (None,))
ONE_RANK_GROUP = Unsupported("use tensor_parallel_size", ONE)
TEXT_ONLY = Unsupported("prompts are text and token ids", EMPTY)
NO_SPECULATION = Unsupported("one token is generated a step")


def gib(size: Any) -> Any:
    """Bytes in GiB."""
    return size / GIB if is_number(size) else size


VLLM_OPTIONS: dict[str, Fate] = {
    # There by another name
    "enable_prefix_caching": Renamed("block_manager", {True: "prefix", False: "plain"}),
    "num_gpu_blocks_override": Renamed("num_kv_blocks"),
    "num_kvcache_blocks": Renamed("num_kv_blocks", {-1: None}),
    "kvcache_block_size": Renamed("block_size"),
    "kv_cache_memory_bytes": Renamed("kv_cache_gib", gib),
    "attention_backend": Renamed(
        "attention", {"FLASH_ATTN": "flash", "TRITON_ATTN": "triton", "TRITON_ATTN_VLLM_V1": "triton",
                      "TORCH_SDPA": "torch", "CPU_ATTN": "torch"},
    ),
    "scheduling_policy": Renamed("scheduler"),
    "async_scheduling": Renamed("overlap"),
    "cudagraph_capture_sizes": Renamed("graph_sizes"),
    "cuda_graph_sizes": Renamed("graph_sizes"),
    # Nothing to do
    "swap_space": Ignored("a preempted sequence is computed again", (None, 0)),
    "disable_log_stats": Ignored("nothing is logged unless you ask for it"),
    "disable_log_requests": Ignored("nothing is logged unless you ask for it"),
    "enable_log_requests": Ignored("nothing is logged; write an observer", OFF),
    "max_seq_len_to_capture": Ignored("captured steps serve every length"),
    "compilation_config": Ignored("graph_sizes, graph_tokens and enforce_eager say what is captured"),
    "optimization_level": Ignored("graph_sizes, graph_tokens and enforce_eager say what is captured"),
    "disable_custom_all_reduce": Ignored("one_shot_kib=0 sums by NCCL", OFF),
    "max_parallel_loading_workers": Ignored("weights are mapped, not copied"),
    "use_tqdm_on_load": Ignored("loading shows no bar"),
    "max_num_partial_prefills": Ignored("prefill chunks of several sequences share a step as they fit", ONE),
    "max_long_partial_prefills": Ignored("prefill chunks of several sequences share a step as they fit", ONE),
    "long_prefill_token_threshold": Ignored("max_num_batched_tokens bounds a chunk", (None, 0)),
    "disable_async_output_proc": Ignored("LLM has one thread", OFF),
    "num_scheduler_steps": Ignored("every step is scheduled", ONE),
    "use_v2_block_manager": Ignored("block_manager says which one serves"),
    "preemption_mode": Ignored("a preempted sequence is computed again", (None, "recompute")),
    "worker_use_ray": Ignored("ranks are processes of this host, or torchrun's", OFF),
    "distributed_executor_backend": Ignored("ranks are processes of this host, or torchrun's", (None, "mp", "uni")),
    "tokenizer_pool_size": Ignored("the tokenizer has threads of its own", (None, 0)),
    "disable_hybrid_kv_cache_manager": Ignored("all layers have one cache", OFF),
    "served_model_name": Ignored("describe() tells the checkpoint"),
    "disable_cascade_attn": Ignored("there is none", (None, True, False)),
    "show_hidden_metrics_for_version": Ignored("there are no such metrics"),
    "guided_decoding_backend": Ignored("llguidance serves structured_outputs", (None, "auto", "guidance")),
    # Not there
    "trust_remote_code": Unsupported(
        "code of a checkpoint is never run, and another architecture is served by a plugin, which "
        "`nanoflow plugins new NAME --role model` begins", OFF,
    ),
    "enable_chunked_prefill": Unsupported(
        "prefill is always chunked; raise max_num_batched_tokens for larger chunks", (None, True)
    ),
    "quantization": Unsupported("weights are float32, float16 or bfloat16"),
    "kv_cache_dtype": Unsupported("the KV cache has the dtype of the model", (None, "auto")),
    "calculate_kv_scales": Unsupported("the KV cache has the dtype of the model", OFF),
    "speculative_config": NO_SPECULATION,
    "speculative_model": NO_SPECULATION,
    "num_speculative_tokens": NO_SPECULATION,
    "pipeline_parallel_size": ONE_RANK_GROUP,
    "data_parallel_size": ONE_RANK_GROUP,
    "decode_context_parallel_size": ONE_RANK_GROUP,
    "prefill_context_parallel_size": ONE_RANK_GROUP,
    "enable_expert_parallel": Unsupported("tensor_parallel_size splits experts too", OFF),
    "enable_lora": Unsupported(NO_LORA.instead, OFF),
    "max_loras": NO_LORA,
    "max_lora_rank": NO_LORA,
    "max_cpu_loras": NO_LORA,
    "lora_modules": NO_LORA,
    "enable_prompt_adapter": Unsupported(NO_LORA.instead, OFF),
    "cpu_offload_gb": Unsupported("weights and KV cache stay on the device", (None, 0)),
    "kv_offloading_size": Unsupported("weights and KV cache stay on the device"),
    "kv_transfer_config": Unsupported("the KV cache belongs to one engine"),
    "kv_events_config": Unsupported("write an observer"),
    "task": Unsupported("text is generated and scored", (None, "auto", "generate")),
    "runner": Unsupported("text is generated and scored", (None, "auto", "generate")),
    "convert": Unsupported("text is generated and scored", (None, "auto", "none")),
    "pooler_config": Unsupported("text is generated and scored"),
    "override_pooler_config": Unsupported("text is generated and scored"),
    "limit_mm_per_prompt": TEXT_ONLY,
    "mm_processor_kwargs": TEXT_ONLY,
    "mm_processor_cache_gb": Unsupported(TEXT_ONLY.instead),
    "disable_mm_preprocessor_cache": Unsupported(TEXT_ONLY.instead, (None, True, False)),
    "allowed_local_media_path": Unsupported(TEXT_ONLY.instead, (None, "")),
    "hf_overrides": Unsupported("edit a copy of config.json", EMPTY),
    "rope_scaling": Unsupported("edit a copy of config.json", EMPTY),
    "rope_theta": Unsupported("edit a copy of config.json"),
    "disable_sliding_window": Unsupported("edit a copy of config.json", OFF),
    "hf_config_path": Unsupported("config.json lies in the checkpoint"),
    "config_format": Unsupported("config.json lies in the checkpoint", (None, "auto", "hf")),
    "model_impl": Unsupported("model= names a plugin", (None, "auto", "vllm")),
    "download_dir": Unsupported("set the environment variable HF_HOME"),
    "hf_token": Unsupported("set the environment variable HF_TOKEN, or run: hf auth login", OFF),
    "code_revision": Unsupported("code of a checkpoint is never run"),
    "tokenizer_revision": Unsupported("download that revision, and give its folder as tokenizer="),
    "tokenizer_mode": Unsupported("transformers loads the tokenizer", (None, "auto", "hf")),
    "skip_tokenizer_init": Unsupported("give prompts as token ids, and SamplingParams(detokenize=False)", OFF),
    "override_generation_config": Unsupported("give SamplingParams with each call", EMPTY),
    "ignore_patterns": Unsupported("only safetensors are read", EMPTY),
    "model_loader_extra_config": Unsupported("only safetensors are read", EMPTY),
    "logits_processors": Unsupported("name a plugin in SamplingParams(logits_processors={name: arguments})", EMPTY),
    "logits_processor_pattern": Unsupported("name a plugin in SamplingParams(logits_processors={name: arguments})"),
    "structured_outputs_config": Unsupported("SamplingParams(structured_outputs=...) is all there is to say", EMPTY),
    "reasoning_parser": Unsupported("the text comes as the model writes it", (None, "")),
    "enable_sleep_mode": Unsupported("close() frees the device", OFF),
    "scheduler_cls": Unsupported("write a scheduler plugin"),
    "worker_cls": Unsupported("write a plugin for the part that differs", (None, "auto")),
    "worker_extension_cls": Unsupported("write a plugin for the part that differs", (None, "")),
    "additional_config": Unsupported("each option is a keyword of its own", EMPTY),
    "otlp_traces_endpoint": Unsupported("write an observer"),
    "collect_detailed_traces": Unsupported("write an observer"),
    "enable_dbo": Unsupported("there are no micro-batches", OFF),
    "enable_eplb": Unsupported("tensor_parallel_size splits experts too", OFF),
}  # fmt: skip

# Other ways to spell the values of options that there are.
SPELLINGS: dict[str, dict[Any, Any]] = {
    "dtype": {"half": "float16", "fp16": "float16", "float": "float32", "fp32": "float32", "bf16": "bfloat16",
              "torch.float16": "float16", "torch.float32": "float32", "torch.bfloat16": "bfloat16"},
    "generation_config": {"vllm": "none"},
    "load_format": {"safetensors": "auto", "hf": "auto"},
    "seed": {None: 0},
}  # fmt: skip


def translated(options: Mapping[str, Any], known: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Options by their names and values here. Those with nothing to do are left out, with a warning.

    Args:
        options: as the caller gave them.
        known: names that mean something here; they are never looked up in the table.
        owner: who was called, for messages.

    Raises:
        ConfigError: an option that is not supported, or one that was given by both of its names.
    """
    result: dict[str, Any] = {}
    for name, value in options.items():
        fate = None if name in known else VLLM_OPTIONS.get(name)
        if fate is None:
            result[name] = _spelt(SPELLINGS.get(name, {}), value)
        elif isinstance(fate, Renamed):
            if fate.name in options:
                raise ConfigError(f"{owner}() got {name} and {fate.name}, which are one here; give {fate.name} alone.")
            if value is not None:
                result[fate.name] = fate.values(value) if callable(fate.values) else _spelt(fate.values or {}, value)
        elif not _is_among(value, fate.unset):
            _turn_down(owner, name, value, fate)
    return result


def _turn_down(owner: str, name: str, value: Any, fate: Ignored | Unsupported) -> None:
    if isinstance(fate, Unsupported):
        raise ConfigError(f"{owner}({name}={shown(value):.100}) is not supported: {fate.instead}.")
    warnings.warn(f"{owner}({name}=...) is ignored: {fate.why}.", stacklevel=5)


def _spelt(spellings: Mapping[Any, Any], value: Any) -> Any:
    """What a value is called here; a `torch.dtype` is known by its text."""
    key = str(value) if type(value).__name__ == "dtype" else value
    return next((here for there, here in spellings.items() if _is_among(key, (there,))), value)


def _is_among(value: Any, known: tuple[Any, ...]) -> bool:
    """Whether a value is one of these, of the same type; also for values that can't be compared."""
    return any(type(value) is type(item) and value == item for item in known)
