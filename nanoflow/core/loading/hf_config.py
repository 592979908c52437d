"""A checkpoint's config.json, and what the engine itself reads in it; models read the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import CheckpointError, shown
from nanoflow.core.loading.foreign_formats import why_no_config
from nanoflow.core.loading.json_files import read_json

# Other names of dtypes in checkpoints.
DTYPES = {
    "float": "float32", "fp32": "float32", "f32": "float32", "half": "float16", "fp16": "float16", "f16": "float16",
    "bf16": "bfloat16", "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip
SERVED_DTYPES = ("float32", "float16", "bfloat16", "float64")


class HFConfig(dict[str, Any]):
    """A checkpoint's config.json, in which a key that the model needs and that is absent is the user's to mend."""

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"The checkpoint's config.json has no {key!r}, which its architecture needs.")


def read_config(folder: Path) -> HFConfig:
    """The checkpoint's config.json.

    Raises:
        CheckpointError: it is missing or is no JSON object, its `architectures` are no list of names, or it asks for
            what no model here serves: quantized weights, or layers with configs of their own.
    """
    file = folder / "config.json"
    if not file.exists() and not file.is_symlink():
        raise CheckpointError(why_no_config(folder))
    config = HFConfig(read_json(file))
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{file}: architectures must be a list of names, got {shown(names):.60}.")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise CheckpointError(
                f"{file}: the checkpoint is quantized ({_quant_method(config[key])}), and quantized weights are not "
                "served; use the original checkpoint, in bfloat16 or float16."
            )
    if config.get("per_layer_config"):
        raise CheckpointError(f"{file}: per_layer_config gives layers configs of their own, which is not served.")
    return config


def stored_dtype(config: dict[str, Any]) -> str | None:
    """What the checkpoint's weights are in, as PyTorch calls it; None if config.json doesn't say.

    Raises:
        CheckpointError: it says what no weights can be in here.
    """
    for key in ("dtype", "torch_dtype"):
        said = config.get(key)
        if said is None or said == "auto":
            continue
        name = said.lower().removeprefix("torch.") if isinstance(said, str) else ""
        name = DTYPES.get(name, name)
        if name not in SERVED_DTYPES:
            raise CheckpointError(
                f"The checkpoint's config.json says {key}={shown(said):.60}, but one of {', '.join(SERVED_DTYPES)} is "
                "needed; set engine.dtype to run it in another one."
            )
        return name
    return None


def _quant_method(said: Any) -> str:
    """What to call how a checkpoint is quantized."""
    if not isinstance(said, dict):
        return f"{shown(said):.60}"
    method = said.get("quant_method") or said.get("quant_algo") or said.get("format")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        method = "bitsandbytes"
    return f"{method:.60}" if isinstance(method, str) else "by a method that it does not name"
