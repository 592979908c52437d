"""Every option and its default, and nothing else: the only home of defaults.

The dataclasses are frozen and check themselves, whoever fills them: the command line (through Hydra), `LLM(...)` or a
test. Plugins keep their own options in a dataclass of the same kind, next to their code. Field comments are shown by
`run --help`: keep them to one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoflow.core.config.errors import shown
from nanoflow.core.config.fields import field_names, is_int, is_number, list_of, make_plain, option, require

BUNDLED_CHECKPOINT = "bard"


@dataclass(frozen=True)
class EngineConfig:
    """Options of the engine itself, whatever the plugins.

    Raises:
        ConfigError: a value out of its range.
    """

    dtype: str = option("auto", "auto | float32 | float16 | bfloat16; auto: float32 on a CPU, else the checkpoint's")
    revision: str | None = option(None, "branch, tag or commit of the checkpoint's Hub repository; null: main")
    tokenizer: str | None = option(None, "folder or Hub id of another tokenizer; null: the checkpoint's")
    device: str = option("auto", "auto | cpu | cuda | cuda:N; auto: a GPU if there is one")
    seed: int = option(0, "seeds requests that have no seed of their own, and dummy weights")
    max_model_len: int | None = option(None, "most tokens of prompt and output together; null: what the model allows")
    block_size: int = option(16, "tokens in a block of the KV cache")
    num_kv_blocks: int | None = option(None, "blocks in the KV cache; null: from kv_cache_gib or the memory there is")
    kv_cache_gib: float | None = option(None, "size of the KV cache in GiB; null: from the memory there is")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory that this engine may use, in (0, 1]")
    load_format: str = option("auto", "auto: the checkpoint's weights | dummy: random ones, config.json is enough")
    tensor_parallel_size: int = option(1, "ranks that share each layer, with a GPU each; on a CPU they are processes")
    one_shot_kib: int | None = option(
        None, "KiB up to which a layer's sum and the norm behind it are one kernel, over memory that GPUs of one host "
        "share; 0: sums by NCCL; null: 8192, or 0 where they can't",
    )  # fmt: skip
    accelerate: bool = option(
        True, "false: plain PyTorch only: no kernels of ours, no CUDA graphs, attention=auto takes torch"
    )
    enforce_eager: bool = option(False, "run steps kernel by kernel instead of as CUDA graphs")
    graph_sizes: list[int] | None = option(None, "batch sizes to capture decode steps for; null: up to max_num_seqs")
    graph_tokens: list[int] | None = option(
        None, "token counts to capture steps with prefill for, [] for none; null: up to 8192"
    )
    generation_config: str = option(
        "auto", "auto: default sampling parameters from the checkpoint's generation_config.json | none: vLLM's"
    )
    overlap: bool | None = option(None, "schedule the next step while one runs; null: on a GPU")
    num_threads: int | None = option(
        None, "threads that each rank computes with on a CPU; null: by the model's size and the cores that are idle"
    )
    freeze_gc: bool = option(
        False, "leave out what exists when the engine is built from Python's garbage collections, in the whole process"
    )
    max_n: int = option(4096, "most completions of a request")
    max_logprobs: int = option(2048, "most candidates that a request may ask log-probabilities of, for a sampled token")
    max_prompt_logprobs: int = option(128, "the same for a token of the prompt")
    max_logit_bias: int = option(16384, "most entries in logit_bias")
    max_stop: int = option(256, "most stop strings of a request")
    max_bad_words: int = option(1024, "most bad words of a request")
    max_text_length: int = option(4096, "most characters in a stop string, a bad word or a cache salt")
    max_grammar_length: int = option(2**18, "most characters in a schema, a regex, a grammar or the texts of a choice")
    max_prompt_bytes: int | None = option(
        None, "most bytes in a prompt in words; null: what max_model_len of the longest tokens have, at least 256 KiB"
    )
    max_queued_requests: int = option(65536, "most unfinished requests of an AsyncLLM; more are refused")
    max_queued_tokens: int = option(2**28, "most tokens in the prompts of these; more are refused")
    debug: bool = option(False, "check after each call that scheduler and block manager keep to their contracts")

    def __post_init__(self) -> None:
        make_plain(self)
        for name, choices in {
            "dtype": ("auto", "float32", "float16", "bfloat16"),
            "load_format": ("auto", "dummy"),
            "generation_config": ("auto", "none"),
        }.items():
            value = getattr(self, name)
            is_one = isinstance(value, str) and value in choices
            require(is_one, f"engine.{name}", value, "one of " + ", ".join(choices))
        for name in ("num_kv_blocks", "num_threads"):
            value = getattr(self, name)
            require(value is None or (is_int(value) and value >= 1), f"engine.{name}", value, "an integer >= 1 or null")
        for name in (item for item in field_names(type(self)) if item.startswith("max_")):
            value, nullable = getattr(self, name), name in ("max_model_len", "max_prompt_bytes")
            expected = "an integer >= 1 or null" if nullable else "an integer >= 1"
            require((nullable and value is None) or (is_int(value) and value >= 1), f"engine.{name}", value, expected)
        for name, meaning in {"revision": "a branch, tag or commit", "tokenizer": "a folder or a Hub id"}.items():
            value = getattr(self, name)
            require(value is None or (isinstance(value, str) and value != ""), f"engine.{name}", value,
                    f"{meaning}, or null")  # fmt: skip
        size, most = self.tensor_parallel_size, self.one_shot_kib
        require(is_int(size) and size >= 1, "engine.tensor_parallel_size", size, "an integer >= 1")
        require(most is None or (is_int(most) and most >= 0), "engine.one_shot_kib", most, "an integer >= 0 or null")
        require(isinstance(self.device, str), "engine.device", self.device, "auto, cpu, cuda or cuda:N")
        require(is_int(self.seed), "engine.seed", self.seed, "an integer")
        require(
            is_int(self.block_size) and self.block_size >= 1, "engine.block_size", self.block_size, "an integer >= 1"
        )
        require(self.kv_cache_gib is None or (is_number(self.kv_cache_gib) and self.kv_cache_gib > 0),
                "engine.kv_cache_gib", self.kv_cache_gib, "a number > 0 or null")  # fmt: skip
        require(is_number(self.gpu_memory_utilization) and 0 < self.gpu_memory_utilization <= 1,
                "engine.gpu_memory_utilization", self.gpu_memory_utilization, "a number in (0, 1]")  # fmt: skip
        for name in ("accelerate", "enforce_eager", "freeze_gc", "debug"):
            require(isinstance(getattr(self, name), bool), f"engine.{name}", getattr(self, name), "true or false")
        require(
            list_of(self.graph_sizes, lambda size: is_int(size) and size >= 1)
            and (self.graph_sizes is None or len(self.graph_sizes) > 0),
            "engine.graph_sizes", self.graph_sizes, "a list of integers >= 1, or null",
        )  # fmt: skip
        require(
            list_of(self.graph_tokens, lambda size: is_int(size) and size >= 1),
            "engine.graph_tokens", self.graph_tokens, "a list of integers >= 1, or null",
        )  # fmt: skip
        require(
            self.overlap is None or isinstance(self.overlap, bool),
            "engine.overlap",
            self.overlap,
            "true, false or null",
        )


@dataclass(frozen=True)
class SchedulerConfig:
    """Options that every scheduler has; the engine sizes its buffers by them. Schedulers with more derive from it.

    Raises:
        ConfigError: a value out of its range, or a budget too small for one token of every sequence.
    """

    max_num_seqs: int = option(256, "most sequences in a batch, and most that hold blocks at a time")
    max_num_batched_tokens: int | None = option(
        None, "most tokens in a batch, decodes and prefill chunks together; null: 8192 on a GPU, 2048 on a CPU"
    )

    def __post_init__(self) -> None:
        make_plain(self)
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        require(is_int(seqs) and seqs >= 1, "scheduler.max_num_seqs", seqs, "an integer >= 1")
        wanted = f"an integer >= max_num_seqs ({shown(seqs)}), so that no decode starves, or null"
        fits = tokens is None or (is_int(tokens) and tokens >= seqs)
        require(fits, "scheduler.max_num_batched_tokens", tokens, wanted)

    @property
    def budget(self) -> int:
        """`max_num_batched_tokens`, which a scheduler is never built without."""
        assert self.max_num_batched_tokens is not None
        return self.max_num_batched_tokens


@dataclass(frozen=True)
class PluginChoice:
    """Which plugin serves a role, and options for it.

    Attributes:
        name: the plugin's name, or `auto` to let the engine choose.
        options: values for fields of the plugin's config dataclass; what is absent keeps its default.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


Choice = PluginChoice | tuple[PluginChoice, ...]  # what serves a role: one plugin, or several in this order


@dataclass(frozen=True)
class Config:
    """All that is needed to build an engine.

    Attributes:
        checkpoint: a folder, a Hub id, or the name of one that is shipped.
        engine: options of the engine itself.
        plugins: what serves each role, by the role's name; one that is absent has its default (`core.registry.roles`).
    """

    checkpoint: str = BUNDLED_CHECKPOINT
    engine: EngineConfig = field(default_factory=EngineConfig)
    plugins: Mapping[str, Choice] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The config of which `values` is the `dataclasses.asdict`, maybe by way of JSON."""
        plugins = {
            role: PluginChoice(**choice) if isinstance(choice, dict) else tuple(PluginChoice(**item) for item in choice)
            for role, choice in values["plugins"].items()
        }
        return cls(values["checkpoint"], EngineConfig(**values["engine"]), plugins)
