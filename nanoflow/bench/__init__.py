"""Measuring an engine: workloads, what the device could do at best, and where the time goes. Knows no Hydra."""
