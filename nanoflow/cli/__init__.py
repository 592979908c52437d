"""The command line, `nanoflow` and `python -m nanoflow`: a room for each command, and what they share."""
