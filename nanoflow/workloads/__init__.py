"""Requests to measure with, at once or over time, and the least time that a device needs for them."""
