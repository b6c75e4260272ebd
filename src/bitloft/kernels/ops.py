"""The operators that the rest of bitloft calls; each runs native code where that takes the tensors, else plain torch.

``encode``         x -> PackedTensor (groups along the last axis)
``encode_trellis`` the same with trellis codes, some columns weighing more than others
``decode``         PackedTensor -> values
``decode_rows``    the same, for some rows of a matrix; ``decode_columns`` for some columns
``residual``       x - decode(W), or only its norm, in one pass
``packed_linear``  y[n, out] = sum_in x[n, in] * decode(W)[out, in]
``packed_linear_grad_input``  dx[n, in] = sum_out dy[n, out] * decode(W)[out, in]

What they compute is defined in ``plain`` and nowhere else; ``explain`` says which implementation runs, and why.
"""

from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import Format
from bitloft.kernels import columnwise, cpu, cpu_dequantize, cpu_encode, cpu_linear, cpu_trellis, gpu, plain, trellis
from bitloft.kernels.plain import decode_columns
from bitloft.packed import PackedTensor

ACTIVATIONS = ("bf16", "int8")  # what the input of a product may be rounded to
MANY = 512  # rows of bfloat16 from which decoding a weight for torch's product is cheaper than multiplying its codes

__all__ = [
    "decode",
    "decode_columns",
    "decode_rows",
    "encode",
    "encode_trellis",
    "explain",
    "packed_linear",
    "packed_linear_grad_input",
    "residual",
]


def explain() -> str:
    """Which implementation runs for tensors on the CPU and on CUDA devices, and why."""
    return f"{cpu.explain()}; CUDA tensors: {gpu.explain()}"


def encode(x: Float[Tensor, "*shape"], fmt: Format | str, *, ranges: bool = False) -> PackedTensor:
    """Quantize ``x``; see ``encoding.encode``, whose bytes the native encoder gives."""
    fmt = Format.parse(fmt)
    if fmt.by_column and x.numel() and bool(torch.isfinite(x).all()):
        return columnwise.encode(x, fmt, encode_trellis, decode)
    if fmt.family == "trellis" and not fmt.by_column and x.dim():
        return encode_trellis(x, fmt)
    if cpu_encode.takes(x, fmt):
        return cpu_encode.encode(x, fmt, ranges)
    return plain.encode(x, fmt, ranges=ranges)


def encode_trellis(
    x: Float[Tensor, "*shape"],
    fmt: Format,
    weights: Float[Tensor, " columns"] | None = None,
) -> PackedTensor:
    """Quantize ``x`` to trellis codes where an error of column j costs ``weights[j]``; see ``trellis.encode``."""
    if cpu_trellis.takes(x):
        return cpu_trellis.encode(x, fmt, weights)
    return trellis.encode(x, fmt, weights)


def decode(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """The values that ``packed`` stands for, in ``dtype`` and its own shape; see ``plain.decode``."""
    if cpu_dequantize.takes(packed, dtype):
        return cpu_dequantize.decode(packed, dtype)
    if packed.format.by_column:
        return columnwise.decode(packed, dtype, decode)
    if gpu.takes(packed.codes) and dtype in cpu.DTYPES:
        return gpu.decode(packed, dtype)
    return plain.decode(packed, dtype)


def decode_rows(
    packed: PackedTensor, rows: Int[Tensor, " some"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "some columns"]:
    """The values of some rows of a matrix, by number (an embedding); see ``plain.decode_rows``."""
    if cpu_dequantize.takes(packed, dtype):
        return cpu_dequantize.decode_rows(packed, rows, dtype)
    return plain.decode_rows(packed, rows, dtype)


def residual(x: Float[Tensor, "*shape"], packed: PackedTensor, *, out: Tensor | None = None) -> float:
    """|x - decode(packed)|, the difference written to ``out`` (float32, maybe ``x`` itself) where that is given.

    One pass over ``x`` and the codes, nothing dequantized to memory. Raises KernelError where shapes differ.
    """
    if x.shape != packed.shape or (out is not None and out.shape != packed.shape):
        raise KernelError(f"the residual of a tensor of shape {tuple(x.shape)} and one packed as {packed.shape}.")
    if cpu_dequantize.takes_residual(x, packed, out):
        return cpu_dequantize.residual(x, packed, out)
    if packed.format.by_column:
        difference = torch.sub(x, decode(packed), out=out)
        return float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    return plain.residual(x, packed, out)


def packed_linear(
    x: Float[Tensor, "*batch columns"],
    weight: PackedTensor,
    *,
    bias: Float[Tensor, " rows"] | None = None,
    addend: Float[Tensor, "*batch rows"] | None = None,
    invariant: bool = False,
    activations: str | None = None,
) -> Float[Tensor, "*batch rows"]:
    """y = x @ decode(weight).T + bias + addend, in the dtype of ``x``; see ``plain.packed_linear``.

    ``bias`` and ``addend`` (float32) are added before the sum is rounded. ``activations`` rounds the operands: ``bf16``
    x to bfloat16 (and levels, where the processor has such products), ``int8`` each row of x to 8 bits by its largest
    magnitude and levels to 8 bits; sums stay float32 (``plain.rounded_linear`` defines them).
    ``invariant`` makes what a row gets independent of how many there are. Raises KernelError on a wrong width, and for
    ``invariant`` or ``int8`` where no native kernel does it.
    """
    if activations is not None:
        return _rounded(x, weight, bias, addend, invariant, activations)
    if _decoding_pays(x, weight) and not invariant:
        return _by_tiles(x, weight, bias, addend)
    if cpu_linear.takes(x, weight):
        bias, addend = (t if t is None else t.float().contiguous() for t in (bias, addend))
        return cpu_linear.packed_linear(x, cpu_linear.described(weight), bias=bias, addend=addend, invariant=invariant)
    if invariant:
        raise KernelError(
            f"no native kernel multiplies {weight.format} weights with {x.dtype} on {x.device.type} here, and the "
            "plain definition is not batch invariant; leave batch_invariant out or choose a format of 1 to 4 bits."
        )
    y = _decoded(x, weight)
    for added in (bias, addend):
        y = y if added is None else (y + added.float()).to(y.dtype)
    return y


def _decoded(x: Tensor, weight: PackedTensor) -> Tensor:
    """x @ decode(weight).T where the native library does not multiply codes."""
    if weight.format.by_column:
        plain.check_matrix(x, weight, axis=1)
        return columnwise.linear(x, weight, columnwise.tiles(weight, x.dtype, decode))
    if gpu.takes(x) and gpu.takes(weight.codes) and x.dtype in cpu.DTYPES:
        return gpu.packed_linear(x, weight)
    return plain.packed_linear(x, cpu_linear.canonical(weight))


def _rounded(
    x: Tensor, weight: PackedTensor, bias: Tensor | None, addend: Tensor | None, invariant: bool, activations: str
) -> Tensor:
    if activations not in ACTIVATIONS:
        raise KernelError(f"activations are {activations!r}; use {' or '.join(ACTIVATIONS)}.")
    native = cpu_linear.takes(x, weight)
    if activations == "int8" and not (native and cpu_linear.takes_int8()):
        raise KernelError(
            f"products in 8 bits of {weight.format} weights with {x.dtype} on {x.device.type} need native kernels with "
            "AVX-512 and a format of 1 to 4 bits; leave activations out."
        )
    if native:
        bias, addend = (t if t is None else t.float().contiguous() for t in (bias, addend))
        kept = cpu_linear.described(weight)
        return cpu_linear.packed_linear(x, kept, bias=bias, addend=addend, invariant=invariant, activations=activations)
    return packed_linear(x.bfloat16().to(x.dtype), weight, bias=bias, addend=addend, invariant=invariant)


def packed_linear_grad_input(
    grad: Float[Tensor, "*batch rows"], weight: PackedTensor
) -> Float[Tensor, "*batch columns"]:
    """dx = grad @ decode(weight), in the dtype of ``grad``: all that backward needs, the weight being frozen.

    Native code decodes; the product is torch's, whose matrix multiplication is as good as ours for many rows.
    """
    if gpu.takes(grad) and gpu.takes(weight.codes) and grad.dtype in cpu.DTYPES and not weight.format.by_column:
        return gpu.packed_linear_grad_input(grad, weight)
    weight = cpu_linear.canonical(weight)
    plain.check_matrix(grad, weight, axis=0)
    if not cpu_dequantize.takes(weight, grad.dtype):
        if weight.format.by_column:
            return columnwise.grad_input(grad, weight, columnwise.tiles(weight, grad.dtype, decode))
        return plain.packed_linear_grad_input(grad, weight)
    flat = grad.reshape(prod(grad.shape[:-1]), grad.shape[-1])
    out: Tensor | None = None
    with torch.no_grad():
        for rows, tile in cpu_dequantize.tiles(weight, grad.dtype):
            out = flat[:, rows] @ tile if out is None else out.addmm_(flat[:, rows], tile)
    if out is None:
        out = grad.new_zeros(flat.shape[0], weight.shape[1])
    return out.view(*grad.shape[:-1], weight.shape[1])


def _decoding_pays(x: Tensor, weight: PackedTensor) -> bool:
    """Whether torch's product with decoded tiles is faster than ours: many rows of bfloat16, codes as stored."""
    return (
        x.dtype is torch.bfloat16
        and not weight.arranged
        and len(weight.shape) == 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= MANY * max(x.shape[-1], 1)
        and x.device.type == "cpu"
        and cpu_dequantize.takes(weight, x.dtype)
    )


def _by_tiles(x: Tensor, weight: PackedTensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    """Tiles in bfloat16 times x. What is added is rounded to bfloat16 by itself, the sum once."""
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(flat.shape[0], weight.shape[0])
    added = bias if addend is None else addend.reshape(out.shape) if bias is None else addend.reshape(out.shape) + bias
    added = None if added is None else added.to(x.dtype).expand(out.shape)
    with torch.no_grad():
        for rows, tile in cpu_dequantize.tiles(weight, x.dtype):
            if added is None:
                torch.mm(flat, tile.T, out=out[:, rows])
            else:
                torch.addmm(added[:, rows], flat, tile.T, out=out[:, rows])
    return out.view(*x.shape[:-1], weight.shape[0])
