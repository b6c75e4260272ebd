"""One decoding step of a model of Llama's shape as one native call: the binding of ``native/decoder.cpp``.

The model is described once, a ``Plan`` says which adapters the rows of a batch take, and a step hands over the hidden
states of the new tokens with one cache per row. Everything is float32. The structs' fields are explained in
``native/bitloft.h``.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, addressof, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.cpu_lora import Blocks, Job, Rows
from bitloft.packed import PackedTensor

SLOTS = 64  # a cache's capacity is a multiple of this many positions (native/glue.hpp)


class _Products(ctypes.Structure):
    _fields_ = (
        ("count", c_int64),
        ("weights", POINTER(cpu.Matrix)),
        ("biases", POINTER(c_void_p)),
        ("deltas", c_void_p),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p), ("inner_norm", c_void_p), ("attention", _Products), ("output", _Products),
        ("gates", _Products), ("down", _Products),
    )  # fmt: skip


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("count", c_int64), ("layers", POINTER(_Layer)), ("norm", c_void_p), ("width", c_int64), ("inner", c_int64),
        ("heads", c_int64), ("key_heads", c_int64), ("head_width", c_int64), ("eps", c_float), ("scale", c_float),
        ("cos", c_void_p), ("sin", c_void_p), ("positions", c_int64),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("capacity", c_int64), ("length", c_int64))


class Projection(NamedTuple):
    """One linear of a layer: its path in the model, its weight [out, in], and its bias and start (A0, B0t) or None."""

    name: str
    weight: PackedTensor
    bias: Float[Tensor, " out"] | None
    start: tuple[PackedTensor, PackedTensor] | None
    scaling: float


class NativeLayer(NamedTuple):
    """The parts of one layer; ``attention`` is queries, keys, values, ``gates`` is gate, up."""

    input_norm: Float[Tensor, " width"]
    inner_norm: Float[Tensor, " width"]
    attention: Sequence[Projection]
    output: Sequence[Projection]
    gates: Sequence[Projection]
    down: Sequence[Projection]

    def groups(self) -> tuple[Sequence[Projection], ...]:
        """The projections that share an input, in the order in which a step takes them."""
        return self.attention, self.output, self.gates, self.down


class Segment(NamedTuple):
    """Rows of a batch, by number, and what gives the blocks that they take at the path of a linear, or None."""

    rows: Sequence[int]
    blocks: Callable[[str], Blocks | None]


class Plan:
    """Which rows of a batch take which adapters, as the native side reads it."""

    def __init__(self, rows: Rows, layers: "ctypes.Array[_Layer]", held: object) -> None:
        self.rows, self.layers, self.held = rows, layers, held


@cache
def _functions() -> tuple[Any, Any]:
    native = cpu.library()
    if native is None:
        raise KernelError(f"the decoder needs the native library: {cpu.explain()}.")
    decoder, caches = POINTER(_Decoder), POINTER(_Cache)
    native.bl_decode_floats.argtypes = (decoder, caches, c_int64)
    native.bl_decode_floats.restype = c_int64
    native.bl_decode.argtypes = (decoder, c_void_p, caches, c_int64, c_void_p, c_void_p, c_int64, c_int)
    return native.bl_decode_floats, native.bl_decode


class NativeDecoder:
    """The layers of a model between its embedding and its output head.

    ``heads`` is the number of query heads, of key heads, and the width of a head. Holds the tensors that it is given
    and their addresses: they may change in place but not be replaced. ``rotate`` comes before the first step.
    """

    def __init__(
        self,
        layers: Sequence[NativeLayer],
        *,
        norm: Float[Tensor, " width"],
        heads: tuple[int, int, int],
        eps: float,
        scale: float,
    ) -> None:
        self._layers, self._norm = tuple(layers), norm
        self._shared = {
            p.name: Blocks([p.start], p.scaling)
            for layer in layers
            for group in layer.groups()
            for p in group
            if p.start is not None
        }
        self._matrices = [[_matrices(group) for group in layer.groups()] for layer in layers]
        query, key, width = heads
        inner = layers[0].down[0].weight.shape[1]
        self._struct = _Decoder(
            count=len(layers), norm=norm.data_ptr(), width=norm.numel(), inner=inner, heads=query, key_heads=key,
            head_width=width, eps=eps, scale=scale,
        )  # fmt: skip
        self._scratch = torch.empty(0)
        self._base = self._described(Rows(1, ()), ())  # the start alone is one segment, whatever the size of the batch

    @property
    def positions(self) -> int:
        """Positions whose angles are known: the most tokens of a row."""
        return int(self._struct.positions)

    def rotate(self, cos: Float[Tensor, "positions width"], sin: Float[Tensor, "positions width"]) -> None:
        """Take over the cosines and sines of the positions 0, 1, ..."""
        self._angles = (cos.contiguous(), sin.contiguous())
        self._struct.cos, self._struct.sin = (table.data_ptr() for table in self._angles)
        self._struct.positions = len(cos)

    def plan(self, batch: int, segments: Sequence[Segment] = ()) -> Plan:
        """What a step of ``batch`` rows needs to know; rows that no segment lists are the base's."""
        rows = Rows(batch, [segment.rows for segment in segments])
        layers, held = self._described(rows, segments) if segments else self._base
        return Plan(rows, layers, held)

    def step(
        self,
        hidden: Float[Tensor, "rows width"],
        caches: Sequence[tuple[Tensor, Tensor, int]],
        plan: Plan,
    ) -> None:
        """Turn what the embedding gave into normed final states, in place, one token a row.

        A cache is keys [layers, heads, width, slots], values [layers, heads, slots, width] and the tokens in it; the
        new one is written behind them. Raises KernelError where sizes disagree or a cache is full.
        """
        floats_of, decode = _functions()
        if hidden.dtype != torch.float32 or not hidden.is_contiguous() or len(caches) != plan.rows.batch:
            raise KernelError(f"a step takes {plan.rows.batch} contiguous float32 rows and their caches.")
        described = [_Cache(k.data_ptr(), v.data_ptr(), v.shape[2], length) for k, v, length in caches]
        array = (_Cache * len(caches))(*described)
        self._struct.layers = plan.layers
        floats = floats_of(byref(self._struct), array, len(caches))
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(floats)
        cpu.done(
            decode(
                byref(self._struct), hidden.data_ptr(), array, len(caches), addressof(plan.rows.struct),
                self._scratch.data_ptr(), self._scratch.numel(), torch.get_num_threads(),
            )
        )  # fmt: skip

    def _described(self, rows: Rows, segments: Sequence[Segment]) -> "tuple[ctypes.Array[_Layer], object]":
        """The layers' structs for batches of as many segments as ``rows``, and what keeps their addresses true."""
        held: list[object] = []
        structs = (_Layer * len(self._layers))()
        for struct, layer, matrices in zip(structs, self._layers, self._matrices, strict=True):
            struct.input_norm, struct.inner_norm = layer.input_norm.data_ptr(), layer.inner_norm.data_ptr()
            names = ("attention", "output", "gates", "down")
            for name, group, (weights, biases) in zip(names, layer.groups(), matrices, strict=True):
                deltas = list(self._deltas(group, rows, segments))
                array = (type(deltas[0].struct) * len(deltas))(*(job.struct for job in deltas)) if deltas else None
                held.append((deltas, array))
                setattr(
                    struct, name, _Products(len(group), weights, biases, None if array is None else addressof(array))
                )
        return structs, held

    def _deltas(self, group: Sequence[Projection], rows: Rows, segments: Sequence[Segment]) -> Iterator[Job]:
        """One job for each projection, or none where neither a start nor an adapter adds to any of them."""
        own = [[segment.blocks(p.name) for segment in segments] for p in group]
        shared = [self._shared.get(p.name) for p in group]
        if any(blocks is not None for blocks in (*shared, *(b for each in own for b in each))):
            for p, each, start in zip(group, own, shared, strict=True):
                yield Job(p.weight.shape[0], rows, each, start)


def _matrices(group: Sequence[Projection]) -> "tuple[ctypes.Array[cpu.Matrix], ctypes.Array[c_void_p]]":
    weights = (cpu.Matrix * len(group))(*(cpu.matrix(p.weight) for p in group))
    return weights, (c_void_p * len(group))(*(None if p.bias is None else p.bias.data_ptr() for p in group))
