"""The tokenizer in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path

from nanoflow.core.config.errors import CheckpointError, one_line
from nanoflow.core.config.files import check_is_file
from nanoflow.core.text.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint's folder; None if it has none, so that only token ids can be its prompts.

    Raises:
        CheckpointError: there is one, but it can't be read.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        return None
    for file in files:
        check_is_file(file)
    from transformers import AutoTokenizer

    try:
        # Without the last one, transformers asks on standard input whether to run code that the checkpoint brings.
        return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"The tokenizer in {folder} needs code that the checkpoint brings, which is never run; "
                f"use a checkpoint with a tokenizer that transformers knows."
            ) from None
        raise CheckpointError(f"The tokenizer in {folder} can't be loaded ({one_line(error):.300}).") from error
