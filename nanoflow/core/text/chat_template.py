"""Chat templates: from messages to the text that a checkpoint wants to read, by a program that it brings."""

from __future__ import annotations

from typing import Any

from nanoflow.core.config.errors import RequestError, shown
from nanoflow.core.text.chat_messages import checked_messages, has_parts, with_parts, with_texts
from nanoflow.core.text.template_limits import LONGEST_TEMPLATE, TemplateLimit, bounded


def render(
    hf: Any, messages: list[dict[str, Any]], *, tools: list[Any] | None = None, chat_template: str | None = None,
    add_generation_prompt: bool = True, continue_final_message: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """The conversation as the chat template writes it, which runs in Jinja's sandbox, as transformers does it.

    Args:
        hf: the Hugging Face tokenizer.
        messages: `{"role": ..., "content": ...}` in the order in which they were said. A content may be a list of
            `{"type": "text", "text": ...}`, which are joined by newlines, unless the template takes such lists
            only.
        tools: what the model may call: JSON schemas, or functions with type hints and docstrings.
        chat_template: a Jinja template in place of the checkpoint's.
        add_generation_prompt: end where the assistant begins to speak.
        continue_final_message: end within the last message, which the model goes on with.
        chat_template_kwargs: more variables of the template, such as `enable_thinking`.

    Raises:
        RequestError: there is no chat template, or it refuses the messages, takes too long or writes too much.
    """
    messages = checked_messages(messages)
    if not (chat_template or hf.chat_template):
        raise RequestError("The checkpoint has no chat template; use generate() with a prompt instead of chat().")
    if add_generation_prompt and continue_final_message:
        raise RequestError("continue_final_message needs add_generation_prompt=False; one of the two is the end.")
    if not isinstance(chat_template_kwargs, dict | None):
        raise RequestError(f"chat_template_kwargs must be a dict of variables, got {shown(chat_template_kwargs):.60}.")
    variables = {"tools": tools, "chat_template": chat_template, **(chat_template_kwargs or {})}
    ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    try:
        if has_parts(messages):
            messages = with_parts(messages) if _takes_parts_only(hf, variables) else with_texts(messages)
        return _render(hf, messages, **ends, **variables)
    except TemplateLimit as error:
        raise RequestError(f"The chat template can't be used: {error}; give another as chat_template.") from None
    except Exception as error:  # whatever the template, a program of the checkpoint's, raises
        reason = " ".join(str(error).encode(errors="backslashreplace").decode().split()) or type(error).__name__
        raise RequestError(f"The chat template does not take these messages: {reason.rstrip('.'):.500}.") from error


def _render(hf: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    template = options["chat_template"] or hf.get_chat_template(tools=options["tools"])
    if len(template) > LONGEST_TEMPLATE:
        raise TemplateLimit(f"it has {len(template)} characters, {LONGEST_TEMPLATE} at most are read")
    return bounded(lambda: hf.apply_chat_template(messages, tokenize=False, **options))


def _takes_parts_only(hf: Any, variables: dict[str, Any]) -> bool:
    """Whether the chat template leaves out contents that are texts, since it looks for parts in them."""
    probe = "a content that is a text"
    try:
        return probe not in _render(hf, [{"role": "user", "content": probe}], **variables)
    except TemplateLimit:
        raise
    except Exception:  # it wants more than this message; whether it takes the real ones turns out later
        return False
