"""What to tell about a folder that holds a model in a form that isn't read here, and what would help."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.loading.json_files import read_json

ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def why_no_config(folder: Path) -> str:
    """One sentence about a folder without config.json."""
    names = _names(folder)
    if ADAPTER in names:
        return _adapter(str(folder), _base_model(folder / ADAPTER))
    if any(name.endswith(".gguf") for name in names):
        return _gguf(str(folder))
    if any(name.endswith(".onnx") for name in names):
        return _onnx(str(folder))
    if "params.json" in names:
        return _publisher(str(folder))
    return f"{folder / 'config.json'} is missing; a checkpoint is a folder with config.json and safetensors."


def why_no_weights(place: str, names: Iterable[str]) -> str:
    """One sentence about a folder or a repository with these files, none of which the weights are read from."""
    names = sorted(names)

    def some(*endings: str) -> str | None:
        return next((name for name in names if name.endswith(endings)), None)

    if pickle := some(*PICKLES):
        return (
            f"The weights in {place} are a pickle ({pickle:.60}), which can run code and is never read; write them as "
            "safetensors once, in Python: transformers.AutoModelForCausalLM.from_pretrained(OLD, "
            'dtype="auto").save_pretrained(NEW), and copy the tokenizer\'s files.'
        )
    if some(".gguf"):
        return _gguf(place)
    if some("adapter_model.safetensors"):
        return _adapter(place, None)
    if some("consolidated.safetensors") or any(name.startswith("consolidated") for name in names):
        return _publisher(place)
    if some(".onnx"):
        return _onnx(place)
    if other := some(".safetensors"):
        return (
            f"There is neither model.safetensors nor model.safetensors.index.json in {place}, only files like "
            f"{other:.60}; rename the file that holds the whole model to model.safetensors, or copy the index too."
        )
    return f"There are no *.safetensors files in {place}; to run without weights set engine.load_format=dummy."


def why_no_folder(file: Path) -> str:
    """One sentence about a file that is named where a checkpoint's folder is asked for."""
    if file.suffix == ".gguf":
        return _gguf(str(file))
    return f"Checkpoint {str(file)!r} is a file; name the folder that it lies in."


def _gguf(place: str) -> str:
    return (
        f"{place} holds a model in GGUF, the format of llama.cpp, which is not read here; use the original checkpoint, "
        "a folder or a Hub repository with config.json and safetensors."
    )


def _onnx(place: str) -> str:
    return (
        f"{place} holds a model in ONNX, which is not read here; use the checkpoint that it was exported from, with "
        "config.json and safetensors."
    )


def _publisher(place: str) -> str:
    return (
        f"{place} holds a model in its publisher's own format, which is not read here; use the files of the same model "
        "for transformers, with config.json and model.safetensors."
    )


def _adapter(place: str, base: str | None) -> str:
    return (
        f"{place} holds an adapter (LoRA){f' of {base:.80}' if base else ''}, not a whole model; merge the two with "
        "peft's merge_and_unload() and save_pretrained(), and name the folder of the result."
    )


def _base_model(file: Path) -> str | None:
    try:
        base = read_json(file).get("base_model_name_or_path")
    except CheckpointError:
        return None
    return base if isinstance(base, str) else None


def _names(folder: Path) -> set[str]:
    try:
        return {file.name for file in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"The folder {folder} can't be read ({error.strerror}).") from error
