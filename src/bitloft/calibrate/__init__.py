"""Calibration: what a text says about a model's weights, gathered block by block on the already quantized prefix."""
