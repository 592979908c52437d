"""What can be set: the dataclasses of each command, and how values are checked."""
