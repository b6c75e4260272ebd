"""The grid of bench/quality_adapter.py: what is trained on what, what is packed how, and what came of it."""
