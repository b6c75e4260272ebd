"""The grid of bench/quality_base.py: which bases are made, how each is trained on, and what came of it."""
