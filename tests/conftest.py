"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tiny models gain nothing from more, and the workers of a parallel run share the cores

settings.register_profile(
    "nanoflow",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nanoflow")
