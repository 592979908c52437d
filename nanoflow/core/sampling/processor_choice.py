"""Whether a request uses logits processors: most use none, which is all that the step loop asks about them."""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor


class ProcessorChoice:
    """The logits processors of an engine by name; `LogitsProcessors` is how they are used.

    Args:
        by_name: in the order in which they apply. A name that is not among them is looked up all the same, so that the
            mapping's own error says why it can't be had.
    """

    def __init__(self, by_name: Mapping[str, LogitsProcessor]) -> None:
        self.by_name = by_name
        for name, processor in by_name.items():
            processor.name = name
        self.processors = list(by_name.values())
        self.asked = [p for p in self.processors if p.fields is None and type(p).uses is not LogitsProcessor.uses]
        fields = {"logits_processors"}.union(*(p.fields or () for p in self.processors))
        defaults = SamplingParams()
        self.defaults = [(name, getattr(defaults, name)) for name in sorted(fields)]

    def may_use(self, params: SamplingParams) -> bool:
        """False if it is plain that a request with these parameters uses none; so most requests cost no call of any."""
        for name, default in self.defaults:
            if getattr(params, name) != default:
                return True
        return any(processor.uses(params) for processor in self.asked)
