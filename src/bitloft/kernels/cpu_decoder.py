"""One decoding step of a model of Llama's shape as one native call: the binding of ``native/decoder.cpp``.

The model is described once, a ``Plan`` says which adapters the rows of a batch take, and a step hands over the hidden
states of the new tokens with one cache per row. Everything is float32. The structs' fields are explained in
``native/bitloft.h``.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, addressof, byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.cpu_linear import INVARIANT
from bitloft.kernels.cpu_lora import BlockList, Blocks, Job, Lora, Rows, Segments
from bitloft.packed import PackedTensor

GROUPS = ("attention", "output", "gates", "down")  # of a layer, in the order of ``NativeLayer.groups``
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
        ("cos", c_void_p), ("sin", c_void_p), ("positions", c_int64), ("flags", c_int32),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("capacity", c_int64), ("length", c_int64))


def caches_of(rows: Sequence[tuple[Any, int]]) -> "ctypes.Array[_Cache]":
    """The caches of a step in which each row (keys, values, length) takes some tokens: one entry for each token, all
    with the row's memory."""
    found = (_Cache * sum(count for _, count in rows))()
    at = 0
    for row, count in rows:
        keys, values, capacity = row.keys.data_ptr(), row.values.data_ptr(), row.values.shape[2]
        for length in range(row.length, row.length + count):
            found[at] = _Cache(keys, values, capacity, length)
            at += 1
    return found


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


class Plan(NamedTuple):
    """Which rows of a batch take which adapters, as the native side reads it."""

    segments: Segments
    batch: int | None  # rows; None where any number will do
    layers: "ctypes.Array[_Layer]"
    held: object


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
        invariant: bool = False,
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
            head_width=width, eps=eps, scale=scale, flags=INVARIANT * invariant,
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
        return Plan(rows.struct, batch, layers, (rows, held))

    @property
    def names(self) -> list[str]:
        """The paths of all linears, in the order in which a roster's tables list them."""
        return [p.name for layer in self._layers for group in layer.groups() for p in group]

    def roster(self, segments: int, rows: int) -> "Roster":
        """A plan that is filled anew at every step, for so many segments and rows at most."""
        return Roster(self, segments, rows)

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
        if hidden.dtype != torch.float32 or not hidden.is_contiguous() or plan.batch not in (None, len(caches)):
            raise KernelError(f"a step takes {plan.batch} contiguous float32 rows and their caches.")
        described = [_Cache(k.data_ptr(), v.data_ptr(), v.shape[2], length) for k, v, length in caches]
        self.run(hidden, (_Cache * len(caches))(*described), plan)

    def run(self, hidden: Float[Tensor, "rows width"], array: "ctypes.Array[_Cache]", plan: Plan) -> None:
        """The same with caches that are described."""
        floats_of, decode = _functions()
        self._struct.layers = plan.layers
        floats = floats_of(byref(self._struct), array, len(array))
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(floats)
        cpu.done(
            decode(
                byref(self._struct), hidden.data_ptr(), array, len(array), addressof(plan.segments),
                self._scratch.data_ptr(), self._scratch.numel(), torch.get_num_threads(),
            )
        )  # fmt: skip

    def _described(self, rows: Rows, segments: Sequence[Segment]) -> "tuple[ctypes.Array[_Layer], object]":
        """The layers' structs for batches of as many segments as ``rows``, and what keeps their addresses true."""
        held: list[object] = []
        structs = (_Layer * len(self._layers))()
        for struct, layer, matrices in zip(structs, self._layers, self._matrices, strict=True):
            struct.input_norm, struct.inner_norm = layer.input_norm.data_ptr(), layer.inner_norm.data_ptr()
            for name, group, (weights, biases) in zip(GROUPS, layer.groups(), matrices, strict=True):
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


class Roster:
    """Which rows take which adapter, changed between steps without describing anything again.

    The structs of all layers point into one table [linears, segments, 2] of (count, blocks); a segment that gets
    another adapter is one column of it. The last segment has no adapter.
    """

    def __init__(self, decoder: NativeDecoder, segments: int, rows: int) -> None:
        self.segments, self.rows = segments, rows
        count = len(decoder.names)
        self._own = torch.zeros(count, segments + 1, 2, dtype=torch.int64)
        self._begin, self._rows = torch.zeros(segments + 2, dtype=torch.int64), torch.arange(rows, dtype=torch.int32)
        self._columns: list[Tensor | None] = [None] * segments
        layers = (_Layer * len(decoder._layers))()
        held: list[object] = []
        address, size = self._own.data_ptr(), (segments + 1) * ctypes.sizeof(BlockList)
        for struct, layer, matrices in zip(layers, decoder._layers, decoder._matrices, strict=True):
            struct.input_norm, struct.inner_norm = layer.input_norm.data_ptr(), layer.inner_norm.data_ptr()
            for name, group, (weights, biases) in zip(GROUPS, layer.groups(), matrices, strict=True):
                array = (Lora * len(group))()
                for lora, p in zip(array, group, strict=True):
                    shared = decoder._shared.get(p.name)
                    lora.columns = lora.out_stride = p.weight.shape[0]
                    lora.shared = shared.struct if shared is not None else BlockList(0, None)
                    lora.own = ctypes.cast(c_void_p(address), POINTER(BlockList))
                    address += size
                held.append(array)
                setattr(struct, name, _Products(len(group), weights, biases, addressof(array)))
        begin = ctypes.cast(c_void_p(self._begin.data_ptr()), POINTER(c_int64))
        numbers = ctypes.cast(c_void_p(self._rows.data_ptr()), POINTER(c_int32))
        self._plan = Plan(Segments(0, 1, begin, numbers), None, layers, (held, self._own, self._begin, self._rows))

    def fill(self, tables: Sequence[Int[Tensor, "modules 2"]], counts: Sequence[int], rows: int) -> Plan:
        """The plan of a step whose first rows belong to the adapters of these tables, ``counts[i]`` to table i, in this
        order; those behind them, up to ``rows``, are the base's. A table begins with the decoder's linears and is
        not changed. Good until the next call."""
        if len(tables) > self.segments or rows > self.rows or sum(counts) > rows:
            raise KernelError(
                f"a roster for {self.segments} adapters and {self.rows} rows got {len(tables)} and {rows}."
            )
        for i, table in enumerate(tables):
            if self._columns[i] is not table:
                self._own[:, i] = table[: len(self._own)]
                self._columns[i] = table
        used = len(tables)
        if used < self.segments:  # the base's segment follows those in use
            self._own[:, used] = 0
            self._columns[used] = None
        ends = [0]
        for count in (*counts, rows - sum(counts)):
            ends.append(ends[-1] + count)
        self._begin[: len(ends)] = torch.tensor(ends)
        self._plan.segments.count = used + 1
        return self._plan
