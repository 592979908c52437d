"""All that knows Hydra: command lines with overrides, composing configs, sweeps, help."""
