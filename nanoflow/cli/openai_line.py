"""Lines of OpenAI's batch format: `custom_id`, `method`, `url`, and the `body` of a request."""

from __future__ import annotations

from typing import Any

from nanoflow.core.config.errors import ConfigError, did_you_mean

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT_OF = {CHAT: "messages", COMPLETIONS: "prompt"}  # the key of the body that each endpoint needs
IGNORED = ("model", "user", "metadata", "store", "service_tier", "stream", "stream_options")  # they change no token
RESPONSE_FORMATS = ("text", "json_object", "json_schema")


def is_one(values: dict[str, Any]) -> bool:
    """Whether an object of a .jsonl file is such a line."""
    return "body" in values and ("url" in values or "custom_id" in values)


def parts(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stands beside the body, and the body with nanoflow's names.

    Raises:
        ConfigError: another endpoint, or a body that can't be served.
    """
    outside = dict(values)
    body, url = outside.pop("body"), outside.get("url", CHAT)
    if outside.get("method", "POST") != "POST":
        raise ConfigError(f'its method must be "POST", got {outside["method"]!r:.60}.')
    if not isinstance(url, str) or url not in PROMPT_OF:
        raise ConfigError(
            f"its url must be {CHAT} or {COMPLETIONS}, got {url!r:.60}.{did_you_mean(str(url), PROMPT_OF)}"
        )
    if not isinstance(body, dict) or body.get(PROMPT_OF[url]) is None:
        raise ConfigError(f'its body must be an object with "{PROMPT_OF[url]}", which {url} needs.')
    told = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    _prompt(told)
    _lengths_and_stops(told)
    _logprobs(told)
    _response_format(told)
    return outside, told


def _prompt(told: dict[str, Any]) -> None:
    prompt = told.get("prompt")
    if not isinstance(prompt, list):
        return
    if prompt and all(type(item) is int for item in prompt):
        told["prompt_token_ids"] = told.pop("prompt")
    elif len(prompt) == 1:
        told["prompt"] = prompt[0]
        _prompt(told)
    else:
        raise ConfigError("its body has several prompts; give each a line of its own.")


def _lengths_and_stops(told: dict[str, Any]) -> None:
    if "max_completion_tokens" in told:
        told["max_tokens"] = told.pop("max_completion_tokens")
    if isinstance(told.get("stop"), str):
        told["stop"] = [told["stop"]]


def _logprobs(told: dict[str, Any]) -> None:
    """Chat says whether, and how many beside the token itself; completions say how many."""
    most = told.pop("top_logprobs", 0)
    if isinstance(told.get("logprobs"), bool):
        told["logprobs"] = most if told["logprobs"] else None


def _response_format(told: dict[str, Any]) -> None:
    wanted = told.pop("response_format", None)
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in RESPONSE_FORMATS:
        raise ConfigError(
            f"response_format must have one of the types {', '.join(RESPONSE_FORMATS)}, got {wanted!r:.60}."
        )
    if kind == "json_object":
        told["structured_outputs"] = {"json_object": True}
    elif kind == "json_schema":
        schema = wanted.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise ConfigError('response_format of the type json_schema needs {"json_schema": {"schema": {...}}}.')
        told["structured_outputs"] = {"json": schema["schema"]}
