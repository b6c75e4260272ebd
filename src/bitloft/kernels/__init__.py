"""Operators on packed tensors: definitions in plain torch (``ops``), and later the kernels checked against them."""
