"""Measuring an engine: how fast it is, what the device could do at best, and where the time goes."""
