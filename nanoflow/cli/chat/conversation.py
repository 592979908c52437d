"""The conversation of `nanoflow chat`: reads lines, streams answers, and obeys commands."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, replace
from typing import Any

from nanoflow.cli import show
from nanoflow.cli.chat import keyboard
from nanoflow.cli.chat.turns import end_of_turn
from nanoflow.cli.hydra import command_line
from nanoflow.cli.hydra.quoting import unescaped
from nanoflow.cli.settings.checks import checked
from nanoflow.core.api.llm import LLM
from nanoflow.core.config.errors import ConfigError, NanoflowError, RequestError, did_you_mean
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams

COMMANDS = {
    "/help": "show this",
    "/reset": "forget the conversation",
    "/params": "show how answers are sampled; /params temperature=0.5 top_k=20 changes it",
    "/exit": "leave; Ctrl-D does it too",
    '"""': "begins and ends a message of several lines; so does a backslash at the end of a line",
}


class Conversation:
    """One conversation with a model, in the terminal.

    Args:
        llm: has nothing else to do meanwhile.
        params: how to sample, to begin with.
        system: what the model is told first; None for nothing.

    Raises:
        RequestError: the checkpoint has no chat template, or it takes no system message.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        tokenizer = llm.engine.tokenizer
        if tokenizer is None or not tokenizer.hf.chat_template:
            raise RequestError(
                f"The checkpoint {llm.describe()['checkpoint']} has no chat template, which a chat needs; "
                "use `nanoflow run`."
            )
        self.llm = llm
        self.tokenizer = tokenizer
        self.params = _for_chat(params)
        if params.stop is None and not params.ignore_eos and (end := end_of_turn(tokenizer)) is not None:
            self.params = replace(self.params, stop=[end])
        self.start = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = list(self.start)

    def run(self) -> None:
        """Go on until the user leaves."""
        with keyboard.history():
            self._talk()

    def _talk(self) -> None:
        print(show.styled("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.", show.DIM))
        while True:
            try:
                line = keyboard.message()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # drops the line, as a shell does
                print()
                continue
            if line == "/exit":
                return
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._answer(line)
            except NanoflowError as error:
                print(show.styled(str(error), show.YELLOW))

    def _answer(self, line: str) -> None:
        """Stream the answer; what there is of it when Ctrl-C stops it stays in the conversation."""
        messages = [*self.messages, {"role": "user", "content": line}]
        prompt = {"prompt_token_ids": self.tokenizer.encode_chat(self.tokenizer.render_chat(messages))}
        text, num_tokens, start = "", 0, time.perf_counter()
        outputs = self.llm.stream([prompt], self.params)
        try:
            for output in outputs:
                text += output["text"]
                num_tokens += len(output["token_ids"])
                print(output["text"], end="", flush=True)
            reason = output.outputs[0].finish_reason
        except KeyboardInterrupt:  # it comes between steps, or here
            outputs.close()
            reason = "stopped"
        seconds = time.perf_counter() - start
        self.messages = [*messages, {"role": "assistant", "content": text}]
        print(show.styled(f"\n[{num_tokens} tokens, {num_tokens / seconds:,.1f} tok/s, {reason}]", show.DIM))

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/help":
            print("\n".join(f"{name:<9}{meaning}" for name, meaning in COMMANDS.items()))
        elif command == "/reset":
            self.messages = list(self.start)
            print("The conversation is forgotten.")
        elif command == "/params":
            if rest.strip():
                self.params = _changed(self.params, rest.strip())
            print("\n".join(f"{name}={value}" for name, value in _settable(self.params).items()))
        else:
            raise ConfigError(
                f"There is no command {command!r}; there are: {', '.join(COMMANDS)}.{did_you_mean(command, COMMANDS)}"
            )


def _for_chat(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise ConfigError(f"n must be 1 in a chat, got {params.n}.")
    return replace(params, output_kind=RequestOutputKind.DELTA)


def _settable(params: SamplingParams) -> dict[str, Any]:
    return {name: value for name, value in asdict(params).items() if name not in ("n", "output_kind")}


def _changed(params: SamplingParams, assignments: str) -> SamplingParams:
    """`params` with some fields set, written as on the command line.

    Raises:
        ConfigError: one that can't be read, that does not exist, or a value out of its range.
    """
    values = _settable(params)
    for assignment in re.split(r"\s+(?=\w+=)", assignments):
        override = command_line.parsed(unescaped(assignment))
        if override is None:
            raise ConfigError(f"{assignment!r} can't be read; write /params NAME=VALUE.")
        values[override.key_or_group] = override.value()
    return _for_chat(checked(SamplingParams, values, ""))
