"""Solvers: pure functions from weights to codes and factors. They see tensors and options, never files or modules."""
