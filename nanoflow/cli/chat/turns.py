"""Where a turn of a conversation ends."""

from __future__ import annotations

from nanoflow.core.config.errors import RequestError
from nanoflow.core.text.tokenizer import Tokenizer

ANSWER = "An answer that no template has."


def end_of_turn(tokenizer: Tokenizer) -> str | None:
    """The text by which the chat template ends an answer, where no special token does it; None if that says too little.

    A model that learned its turns by that template goes on with somebody else's after it. One line end says too little:
    an answer may have several lines.
    """
    try:
        text = tokenizer.render_chat(
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}],
            add_generation_prompt=False,
        )
    except RequestError:
        return None
    _, found, end = text.rpartition(ANSWER)
    has_special = any(token in end for token in tokenizer.hf.all_special_tokens)
    return end if found and not has_special and end.strip(" ") not in ("", "\n") else None
