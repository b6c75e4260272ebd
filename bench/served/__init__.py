"""What the serving benchmarks share: many adapters made quickly, and PEFT doing the same requests."""
