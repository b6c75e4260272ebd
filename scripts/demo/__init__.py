"""`make demo`: the whole life of a low-bit LoRA on a real model. One module a part; `__main__` runs them in order."""
