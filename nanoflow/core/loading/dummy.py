"""Random weights, for `load_format=dummy`."""

from __future__ import annotations

import torch

from nanoflow.core.data.parallel import Shard


def fill_random(targets: dict[str, torch.Tensor | Shard | None], seed: int) -> None:
    """Random weights for `load_format=dummy`: norms 1, biases 0, the rest normal with deviation 0.02.

    They don't depend on how many ranks share them.
    """
    for index, (name, target) in enumerate(targets.items()):
        if target is None:
            continue
        part = target.target if isinstance(target, Shard) else target
        if part.dim() == 1:
            part.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        whole = part.new_empty(target.whole_shape) if isinstance(target, Shard) else part
        generator = torch.Generator(part.device).manual_seed((seed + index) % 2**63)
        whole.normal_(0.0, 0.02, generator=generator)
        if isinstance(target, Shard):
            part.copy_(whole[target.index])
