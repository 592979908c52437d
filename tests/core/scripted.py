"""A model that says what it is told to, and tokenizers made on the spot; a plugin of this test suite."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nanoflow import LLM, Component, hookimpl
from nanoflow.core.config.engine_config import Config, EngineConfig, PluginChoice
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.registry.component import NoOptions
from nanoflow.core.registry.registry import Registry

CORPUS = [
    "To be, or not to be: that is the question.",
    "naïve café, Fräulein Müller, 日本語",
    "the end of the end 🎭🎉",
]


class Scripted(ModelArch):
    """After position p comes `script[p]`, and where that is forbidden, `fallback`."""

    num_layers, num_heads, num_kv_heads, head_dim, scale = 1, 1, 1, 1, 1.0

    def __init__(self, config: NoOptions, context: ModelContext) -> None:
        self.vocab_size = context.hf_config["vocab_size"]
        self.script = torch.tensor(context.hf_config["script"])
        self.fallback = context.hf_config["fallback"]

    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        return self.script[positions_T % len(self.script)].unsqueeze(-1)

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden_SD), self.vocab_size)
        logits[:, self.fallback] = 5.0
        return logits.scatter(1, hidden_SD, 10.0)

    def weights(self) -> dict[str, torch.Tensor | None]:
        return {}


@hookimpl
def nanoflow_models() -> list[Component]:
    return [Component("scripted", build=Scripted, architectures=("Scripted",))]


def entry_point(plugin: Any, name: str = "theirs", package: str = "their-package") -> Any:
    """An entry point whose `load` returns `plugin`, or raises it."""

    def load() -> Any:
        if isinstance(plugin, Exception):
            raise plugin
        return plugin

    return SimpleNamespace(name=name, dist=SimpleNamespace(name=package, version="1.2.3"), load=load)


def scripted_llm(folder: Path, script: list[int], tokenizer: Any = None, **options: Any) -> LLM:
    """An LLM whose answer to a prompt of one token is `script`, over and over; options as in `scripted_config`."""
    return LLM.from_config(*scripted_config(folder, script, tokenizer, **options))


def scripted_config(
    folder: Path, script: list[int], tokenizer: Any = None, *, vocab_size: int = 400, eos: int | None = None,
    fallback: int = 1, scheduler: dict[str, Any] | None = None, **engine: Any,
) -> tuple[Config, Registry]:  # fmt: skip
    """The arguments of `LLM.from_config` for that."""
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["Scripted"], "max_position_embeddings": 512, "vocab_size": vocab_size, "script": script,
              "fallback": fallback, "eos_token_id": eos}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    registry = Registry.load(strict=True, extra=[entry_point(sys.modules[__name__])])
    options = EngineConfig(**{"load_format": "dummy", "num_kv_blocks": 256, "device": "cpu"} | engine)
    return Config(str(folder), options, {"scheduler": PluginChoice("fcfs", scheduler or {})}), registry


def byte_level(merges: bool = True) -> Any:
    """A byte-level BPE tokenizer; without merges each byte is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360 if merges else 257, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3 if merges else [], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentencepiece_like() -> Any:
    """A tokenizer in the manner of Llama 2: words begin with a metaspace, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("e", "n"), ("en", "d")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def unigram(byte_fallback: bool = False) -> Any:
    """A tokenizer in the manner of T5, or with `byte_fallback` of converted SentencePiece ones: a metaspace decoder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    data = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    pieces = ["<unk>", "<eos>", *data, "▁", *"abcdefghijklmnopqrstuvwxyz.,", "▁the", "▁end", "▁▁", "é"]
    scores = [(piece, -1.0 if len(piece) > 1 else -5.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, 0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace = decoders.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if byte_fallback else metaspace
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def word_pieces() -> Any:
    """A tokenizer in the manner of BERT, whose words are parted by spaces that no token has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz.,é"
    pieces = ["<unk>", "<eos>", *letters, *(f"##{letter}" for letter in letters), "the", "##nd", "en", "##d"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def word_ends() -> Any:
    """A tokenizer in the manner of the first GPT, whose tokens say where a word ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz.,é"
    pieces = ["<unk>", "<eos>", *letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e</w>")]
    model = models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
