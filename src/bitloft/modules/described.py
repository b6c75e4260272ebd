"""A whole adapter as native code reads it, described at once: one (count, blocks) pair for each module of a model.

``Views`` and ``cpu_lora.Blocks`` make a few objects for every matrix, some thousand for one adapter of a 30-layer model
and a tenth of a second of Python. A server that meets a new adapter every few steps cannot pay that. Here the structs
of all matrices are rows of one integer tensor: a row of a template for the matrix's format and shape, which is made
once, and the addresses of its parts, which follow from the module table by running sums.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from bitloft.adapter_table import ModuleSpec, factors
from bitloft.formats import Format, layout
from bitloft.kernels import cpu, cpu_lora
from bitloft.packed import DTYPES, PackedTensor

WORD = 8
PARTS = ("scales", "codes", "zeros")  # what factors of adapters are made of; scales of a whole adapter come first


class Described(NamedTuple):
    """``table`` [modules, 2] has the number of blocks and their address for each module that was asked for, zeros where
    the adapter does not touch it; ``held`` is what the addresses point at. ``covers`` says whether every module of the
    adapter was asked for."""

    table: Int[Tensor, "modules 2"]
    covers: bool
    held: object

    @property
    def nbytes(self) -> int:
        """Bytes of the description itself."""
        parts = self.held if isinstance(self.held, tuple) else ()
        return self.table.nbytes + sum(part.nbytes for part in parts[1:] if isinstance(part, Tensor))


class _Template(NamedTuple):
    """The words of bl_matrix for one format and shape, and where which part's address goes."""

    words: tuple[int, ...]
    sizes: tuple[int, int, int]  # bytes of PARTS


def _fields(struct: type[ctypes.Structure]) -> dict[str, int]:
    """The number of the word that each field of ``struct`` begins in."""
    return {name: getattr(struct, name).offset // WORD for name, *_ in struct._fields_}


FIELDS = _fields(cpu.Matrix)


@cache
def _template(rows: int, columns: int, fmt: Format) -> _Template:
    parts = layout((rows, columns), fmt)
    tensors = {name: torch.zeros(part.shape, dtype=DTYPES[part.dtype]) for name, part in parts.items()}
    matrix = cpu.matrix(PackedTensor.from_tensors(fmt, (rows, columns), tensors))
    words = torch.frombuffer(bytearray(bytes(matrix)), dtype=torch.int64).tolist()
    for name in ("exponent", *PARTS):
        words[FIELDS[name]] = 0
    sizes = tuple(parts[name].nbytes if name in parts else 0 for name in PARTS)
    return _Template(tuple(words), sizes)  # type: ignore[arg-type]


def describe(payload: Tensor, specs: Sequence[ModuleSpec], modules: Sequence[str]) -> Described:
    """The adapter whose payload and module table are given, for a model's ``modules``. Holds the payload."""
    found = list(factors(specs))
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(found))}
    templates = [_template(*kind) for kind in kinds]
    which = torch.tensor([kinds[factor] for factor in found], dtype=torch.long)
    exponents = torch.tensor(
        [e for spec in specs for block in spec.blocks for e in (block.a_exponent, block.bt_exponent)], dtype=torch.int32
    )
    matrices = _matrices(payload, templates, which, exponents)
    blocks = _blocks(matrices)
    counts = torch.tensor([len(spec.blocks) for spec in specs], dtype=torch.long)
    first = counts.cumsum(0) - counts
    entries = torch.stack([counts, blocks.data_ptr() + first * (blocks.shape[1] * WORD)], 1)
    return _placed(
        entries, {spec.name: i for i, spec in enumerate(specs)}, modules, (payload, matrices, blocks, exponents)
    )


def described_blocks(found: Mapping[str, cpu_lora.Blocks], modules: Sequence[str]) -> Described:
    """The same for blocks that are described one by one."""
    entries = [(blocks.struct.count, ctypes.addressof(blocks.struct.block.contents)) for blocks in found.values()]
    at = {name: i for i, name in enumerate(found)}
    return _placed(torch.tensor(entries, dtype=torch.long).reshape(-1, 2), at, modules, found)


def _placed(entries: Tensor, at: Mapping[str, int], modules: Sequence[str], held: object) -> Described:
    place = torch.tensor([at.get(name, -1) for name in modules], dtype=torch.long)
    table = torch.cat([entries, entries.new_zeros(1, 2)])[place]
    touched = int((entries[:, 0] > 0).sum())
    return Described(table, touched == int((table[:, 0] > 0).sum()), held)


def _matrices(payload: Tensor, templates: Sequence[_Template], which: Tensor, exponents: Tensor) -> Tensor:
    """bl_matrix of every factor, [factors, words]."""
    count = len(which)
    words = torch.tensor([t.words for t in templates], dtype=torch.long).reshape(-1, ctypes.sizeof(cpu.Matrix) // WORD)
    matrices = words[which].contiguous()
    sizes = torch.tensor([t.sizes for t in templates], dtype=torch.long).reshape(-1, len(PARTS))[which]
    scales, rest = sizes[:, 0], sizes[:, 1:].sum(1)
    base = payload.data_ptr()
    codes = base + int(scales.sum()) + rest.cumsum(0) - rest
    matrices[:, FIELDS["scales"]] = base + scales.cumsum(0) - scales
    matrices[:, FIELDS["codes"]] = codes
    matrices[:, FIELDS["zeros"]] = torch.where(sizes[:, 2] > 0, codes + sizes[:, 1], 0)
    matrices[:, FIELDS["exponent"]] = exponents.data_ptr() + 4 * torch.arange(count)
    return matrices


def _blocks(matrices: Tensor) -> Tensor:
    """bl_block of every pair of factors, [blocks, words], the scaling being 1."""
    fields = _fields(cpu_lora.Factor)
    words = matrices.new_zeros(len(matrices), ctypes.sizeof(cpu_lora.Factor) // WORD)
    words[:, fields["rows"]] = matrices[:, FIELDS["rows"]]
    words[:, fields["columns"]] = matrices[:, FIELDS["columns"]]
    words[:, fields["packed"]] = matrices.data_ptr() + torch.arange(len(matrices)) * (matrices.shape[1] * WORD)
    one = torch.ones(len(matrices) // 2, 2).view(torch.int64)  # the float and the padding behind it
    return torch.cat([words.reshape(len(one), -1), one], 1).contiguous()
