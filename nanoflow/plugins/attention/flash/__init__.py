"""`attention=flash`: the FlashAttention that is installed."""
