"""The module table of a packed adapter: which block of which module lies where in the payload.

Compact JSON by columns, zlib-compressed: the 210 modules of a 30-layer model take about 1.5 kB, where one safetensors
entry per module and block would take 100 kB and an adapter of 0.2 bits has 122 kB in all. ``docs/format.md`` lists the
columns. A table comes from a file, so decompression is bounded and every number is checked before a tensor exists.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from bitloft.adapter_config import valid_name
from bitloft.errors import BitloftError, CheckpointError
from bitloft.formats import Format, Part, layout

TABLE_LIMIT = 16 << 20  # bytes of a decompressed table; a thousand modules take 60 kB
WIDTH_LIMIT = 1 << 28  # features on one side of a module
EXPONENT_LIMIT = 400  # scales are in units of 2**exponent; float32 ends at 2**128


class BlockSpec(NamedTuple):
    """Formats, components and scale exponents of one block."""

    a_format: Format
    bt_format: Format
    components: int
    a_exponent: int
    bt_exponent: int


@dataclass(frozen=True)
class ModuleSpec:
    """One module: sizes, rank of the trained pair, relative squared error in thousandths, blocks in payload order."""

    name: str
    in_features: int
    out_features: int
    rank: int
    error: int
    blocks: tuple[BlockSpec, ...]


def parts(modules: Sequence[ModuleSpec]) -> Iterator[tuple[int, int, str, str, Part]]:
    """(module index, block index, "a" or "bt", part name, part) of every tensor in payload order.

    All scales come first, so that int16 views of one byte buffer are aligned; codes and zero points follow.
    """
    for scales in (True, False):
        for m, module in enumerate(modules):
            for b, block in enumerate(module.blocks):
                for side, fmt, width in (
                    ("a", block.a_format, module.in_features),
                    ("bt", block.bt_format, module.out_features),
                ):
                    for name, part in _layout(block.components, width, fmt):
                        if (name == "scales") == scales:
                            yield m, b, side, name, part


@cache
def _layout(components: int, width: int, fmt: Format) -> tuple[tuple[str, Part], ...]:
    """The stored parts of a factor (its exponent is in the table); a model has few different ones."""
    return tuple((name, part) for name, part in layout((components, width), fmt).items() if name != "exponent")


@cache
def factor_bytes(components: int, width: int, fmt: Format) -> tuple[int, int]:
    """Bytes of a factor's scales, and of its other parts."""
    sizes = [(name == "scales", part.nbytes) for name, part in _layout(components, width, fmt)]
    return sum(size for scales, size in sizes if scales), sum(size for scales, size in sizes if not scales)


def factors(modules: Sequence[ModuleSpec]) -> Iterator[tuple[int, int, Format]]:
    """(components, width, format) of every factor, A before B^T."""
    for module in modules:
        for block in module.blocks:
            yield block.components, module.in_features, block.a_format
            yield block.components, module.out_features, block.bt_format


def payload_size(modules: Sequence[ModuleSpec]) -> int:
    return sum(sum(factor_bytes(*factor)) for factor in factors(modules))


def scales_size(modules: Sequence[ModuleSpec]) -> int:
    """Bytes of all scales, which come first in a payload."""
    return sum(factor_bytes(*factor)[0] for factor in factors(modules))


def code_bits(modules: Sequence[ModuleSpec]) -> int:
    """Bits of the codes alone, without padding, scales or zero points."""
    return sum(
        block.components * (block.a_format.bits * m.in_features + block.bt_format.bits * m.out_features)
        for m in modules
        for block in m.blocks
    )


def write_table(modules: Sequence[ModuleSpec]) -> bytes:
    """The compressed table."""
    shapes = sorted({(m.in_features, m.out_features, m.rank) for m in modules})
    blocks = [block for m in modules for block in m.blocks]
    pairs = sorted({(str(b.a_format), str(b.bt_format)) for b in blocks})
    exponents = [[b.a_exponent, b.bt_exponent] for b in blocks]
    if all(e == exponents[0] for e in exponents):
        exponents = exponents[:1]
    columns = {
        "names": [m.name for m in modules],
        "shapes": shapes,
        "shape": [shapes.index((m.in_features, m.out_features, m.rank)) for m in modules],
        "formats": pairs,
        "blocks": [
            [n for b in m.blocks for n in (pairs.index((str(b.a_format), str(b.bt_format))), b.components)]
            for m in modules
        ],
        "exponents": exponents,
        "errors": [m.error for m in modules],
    }
    return zlib.compress(json.dumps(columns, separators=(",", ":")).encode(), 9)


def read_table(data: bytes, where: str) -> tuple[ModuleSpec, ...]:
    """The modules of a compressed table. Raises CheckpointError naming ``where`` for anything that is not one."""
    try:
        return _modules(_unpack(data))
    except (BitloftError, zlib.error, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the module table of {where} is not valid ({error}); it is damaged.") from error


def _unpack(data: bytes) -> dict[str, Any]:
    stream = zlib.decompressobj()
    raw = stream.decompress(data, TABLE_LIMIT)
    if not stream.eof or stream.unused_data:
        raise ValueError(f"truncated, trailing bytes or more than {TABLE_LIMIT} bytes")
    columns = json.loads(raw)
    wanted = {"names", "shapes", "shape", "formats", "blocks", "exponents", "errors"}
    if not isinstance(columns, dict) or set(columns) != wanted:
        raise ValueError("wrong columns")
    return columns


def _modules(columns: dict[str, Any]) -> tuple[ModuleSpec, ...]:
    names = columns["names"]
    if any(not valid_name(name) for name in names) or len(set(names)) < len(names):
        raise ValueError("a module name that is not a path, or one that occurs twice")
    formats = [(_format(a), _format(bt)) for a, bt in columns["formats"]]
    counts = [len(row) // 2 for row in columns["blocks"]]
    exponents = iter(_exponents(columns["exponents"], sum(counts)))
    found = []
    for name, shape, row, error in zip(names, columns["shape"], columns["blocks"], columns["errors"], strict=True):
        inputs, outputs, rank = (_number(n, 1, WIDTH_LIMIT) for n in columns["shapes"][_number(shape, 0, WIDTH_LIMIT)])
        blocks = tuple(
            BlockSpec(*formats[_number(pair, 0, WIDTH_LIMIT)], _number(count, 1, WIDTH_LIMIT), *next(exponents))
            for pair, count in zip(row[::2], row[1::2], strict=True)
        )
        found.append(ModuleSpec(name, inputs, outputs, rank, _number(error, 0, 10**9), blocks))
    return tuple(found)


def _format(text: object) -> Format:
    """A format without what adapters never have (learned levels, shifts, double quantization, codes by column)."""
    found = Format.parse(text) if isinstance(text, str) else None
    if found is None or found.dq or found.has_shifts or found.has_levels or found.by_column:
        raise ValueError(f"{str(text)[:40]} is not a format of adapters")
    return found


def _exponents(rows: list[list[int]], blocks: int) -> list[tuple[int, int]]:
    checked = [
        (_number(a, -EXPONENT_LIMIT, EXPONENT_LIMIT), _number(b, -EXPONENT_LIMIT, EXPONENT_LIMIT)) for a, b in rows
    ]
    spread = checked * blocks if len(checked) == 1 else checked
    if len(spread) != blocks:
        raise ValueError("as many exponents as blocks are needed, or one pair for all")
    return spread


def _number(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{str(value)[:40]} is not an integer from {low} to {high}")
    return value
