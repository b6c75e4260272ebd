"""The operators that the rest of bitloft calls; each runs native code where that takes the tensors, else plain torch.

``encode``         x -> PackedTensor (groups along the last axis)
``decode``         PackedTensor -> values
``decode_rows``    the same, for some rows of a matrix; ``decode_columns`` for some columns
``packed_linear``  y[n, out] = sum_in x[n, in] * decode(W)[out, in]
``packed_linear_grad_input``  dx[n, in] = sum_out dy[n, out] * decode(W)[out, in]

What they compute is defined in ``plain`` and nowhere else; ``explain`` says which implementation runs, and why.
"""

from bitloft.kernels.cpu import explain
from bitloft.kernels.plain import (
    decode,
    decode_columns,
    decode_rows,
    encode,
    packed_linear,
    packed_linear_grad_input,
)

__all__ = [
    "decode",
    "decode_columns",
    "decode_rows",
    "encode",
    "explain",
    "packed_linear",
    "packed_linear_grad_input",
]
