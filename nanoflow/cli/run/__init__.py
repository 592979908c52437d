"""`nanoflow run`: complete prompts with the engine that a config describes, or sweep over configs."""
