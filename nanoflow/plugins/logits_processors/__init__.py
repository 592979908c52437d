"""Built-in logits processors. Their modules import torch, so they are imported when an engine is built."""

from __future__ import annotations

from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext
from nanoflow.core.registry.component import Component, NoOptions
from nanoflow.core.registry.hookspecs import hookimpl


@hookimpl
def nanoflow_logits_processors() -> list[Component]:
    # By priority: biases come before penalties, which share one pass over the logits; then what is masked stays masked.
    return [
        Component("bias_and_penalties", build=_bias_and_penalties, priority=40),
        Component("min_tokens", build=_min_tokens, priority=30),
        Component("bad_words", build=_bad_words, priority=20),
        Component("grammar", build=_grammar, priority=10),
    ]


def _bias_and_penalties(config: NoOptions, context: LogitsProcessorContext) -> LogitsProcessor:
    from nanoflow.plugins.logits_processors.bias_and_penalties import BiasAndPenalties

    return BiasAndPenalties(context)


def _min_tokens(config: NoOptions, context: LogitsProcessorContext) -> LogitsProcessor:
    from nanoflow.plugins.logits_processors.min_tokens import MinTokens

    return MinTokens(context)


def _bad_words(config: NoOptions, context: LogitsProcessorContext) -> LogitsProcessor:
    from nanoflow.plugins.logits_processors.bad_words import BadWords

    return BadWords(context)


def _grammar(config: NoOptions, context: LogitsProcessorContext) -> LogitsProcessor:
    from nanoflow.plugins.logits_processors.grammar import GrammarProcessor

    return GrammarProcessor(context)
