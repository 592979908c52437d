"""`attention=torch`: plain PyTorch, for any device; the reference."""
