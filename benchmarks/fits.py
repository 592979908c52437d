"""Which model fits which card: weights, bytes of KV cache a token, and the tokens that the cache holds, as a table.

    python benchmarks/fits.py
    python benchmarks/fits.py ./my-checkpoint qwen3-8b --share 0.95

Reckoned from config.json, for 16-bit weights; no GPU and no weights are needed. docs/troubleshooting.md has the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.loading.hub import resolve
from nanoflow.workloads.floor import Dims

GIB = 2**30
ELEMENT = 2  # bytes of a weight, a key or a value in bfloat16 or float16
CARDS = (8, 12, 16, 24, 40, 80, 141)  # GB, as they are sold
USABLE = 0.98  # GiB that PyTorch sees of a card, by GB on its box
STEPS = 2.0  # GiB for the CUDA context, the largest step, and captured steps, with default options
LEAST = 1_000  # tokens; with less room than that a model doesn't fit

LLAMA_8B = "Llama 3.1 8B"
LLAMA_8B_CONFIG = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", LLAMA_8B, "qwen3-8b", "qwen3-14b", "qwen3-30b-a3b", "qwen3-32b")


def main() -> int | str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="bundled names, folders with a config.json, Hub ids")
    parser.add_argument("--share", type=float, default=0.9, help="engine.gpu_memory_utilization")
    arguments = parser.parse_args()
    try:
        print(table(arguments.models, arguments.share), end="")
    except NanoflowError as error:
        return str(error)
    return 0


def table(models: tuple[str, ...] = MODELS, share: float = 0.9) -> str:
    """The table in Markdown.

    Raises:
        NanoflowError: there is no such checkpoint.
    """
    lines = [
        "| bfloat16 | weights, GiB | KV cache, KiB a token | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "| --- " * (3 + len(CARDS)) + "|",
    ]
    for model in models:
        hf_config = config_of(model)
        dims = Dims.from_config(hf_config, ELEMENT)
        if dims is None:
            lines.append(f"| {model} | not a kind of model that can be reckoned with |" + " |" * (1 + len(CARDS)))
            continue
        weights = weight_bytes(dims, hf_config)
        rooms = (shown(tokens(dims, weights, card, share)) for card in CARDS)
        kib = dims.kv_bytes_per_token / 1024
        lines.append(f"| {model} | {weights / GIB:.1f} | {kib:g} | {' | '.join(rooms)} |")
    return "\n".join(lines) + "\n"


def config_of(model: str) -> dict[str, Any]:
    """Its config.json."""
    if model == LLAMA_8B:
        return LLAMA_8B_CONFIG
    return json.loads((resolve(model) / "config.json").read_text(encoding="utf-8"))


def weight_bytes(dims: Dims, hf_config: dict[str, Any]) -> int:
    """Bytes of all weights; norms and biases apart, which are less than a thousandth."""
    tables = 1 if hf_config.get("tie_word_embeddings") else 2
    return dims.element * (dims.linear + dims.num_experts * dims.expert + tables * dims.head)


def tokens(dims: Dims, weights: int, card: int, share: float) -> int:
    """Tokens that the KV cache has room for on a card of so many GB; less than 0 if not even the weights have."""
    room = share * USABLE * card * GIB - STEPS * GIB - weights
    return int(room // dims.kv_bytes_per_token)


def shown(count: int) -> str:
    """A number of tokens in thousands."""
    return "no" if count < LEAST else f"{count // 1000:,}k"


if __name__ == "__main__":
    sys.exit(main())
