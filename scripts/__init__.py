"""What `make` runs: set-up, benchmarks at toy size, the demo."""
