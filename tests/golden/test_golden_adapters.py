"""Packed adapters written by earlier versions stay readable, to the byte and to the number.

The second reader below follows docs/format.md with nothing but the standard library; where it and bitloft disagree,
either the page or the code has changed.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitloft.adapters import PackedModule, read_packed
from bitloft.kernels.ops import decode

HERE = Path(__file__).parent
NAMES = ["adapter-waterfill-1", "adapter-loraquant-1", "adapter-waterfill-2", "adapter-int8-1", "adapter-half-1",
         "adapter-trellis-1"]  # fmt: skip
LLOYD_MAX = {2: (0.452780, 1.510418), 3: (0.245094, 0.756005, 1.343909, 2.151946),
             4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590)}  # fmt: skip
TAPS = {
    1: (0x1A7, 0x086, 0x054, 0x1D7),
    2: (0x146, 0x0E4, 0x04A, 0x1DF),
    3: (0x0AC, 0x0D6, 0x157),
    4: (0x064, 0x1D6, 0x0ED),
}
UPPER = {
    1: "19 14 35 35 57 60 87 127",
    2: "4 5 13 13 22 25 32 35 43 47 55 59 72 80 93 127",
    3: "2 6 10 15 19 24 28 33 38 44 51 57 66 78 96 127",
    4: "1 2 5 6 8 10 12 14 15 17 20 22 23 25 28 30 32 34 37 39 42 44 47 51 54 58 63 69 77 87 103 127",
}  # fmt: skip
Rows = list[list[float]]


def walked(codes: bytes, bits: int) -> list[float]:
    """The levels of one row of trellis codes."""
    planes = [unpacked(codes[i : i + len(codes) // bits], 1) for i in range(0, len(codes), len(codes) // bits)]
    upper = [int(level) for level in UPPER[bits].split()]
    levels = [*(-x for x in reversed(upper)), *upper]
    found = []
    for t in range(len(planes[0])):
        window = sum(planes[0][t - d] << d for d in range(9))
        subset = sum((window & tap).bit_count() % 2 << j for j, tap in enumerate(TAPS[bits]))
        p = sum(plane[t] << i for i, plane in enumerate(planes[1:]))
        found.append(levels[subset + (p << len(TAPS[bits]))] / 64)
    return found


def unpacked(data: bytes, bits: int) -> list[int]:
    if bits == 3:
        low, high = unpacked(data[: len(data) * 2 // 3], 2), unpacked(data[len(data) * 2 // 3 :], 1)
        return [a | b << 2 for a, b in zip(low, high, strict=True)]
    return [byte >> shift & (1 << bits) - 1 for byte in data for shift in range(0, 8, bits)]


class Stored:
    """One tensor of the payload by the page: sizes, then values."""

    def __init__(self, spelling: str, rows: int, width: int, exponent: int) -> None:
        family, group = spelling.split(":")
        self.bits = {"sign": 1, "half": 16}.get(family) or int(family[-1])
        self.family, self.rows, self.width, self.exponent = family.rstrip("12348"), rows, width, exponent
        unit = int(group) if group.isdigit() else 8
        self.padded = -(-width // unit) * unit
        self.groups = self.padded // unit if group.isdigit() else {"row": 1, "unit": 0}[group]
        self.row_bytes = self.padded * self.bits // 8
        self.zero_bits = {2: 2, 3: 4, 4: 4}[self.bits] if self.family == "uniform" else 0
        self.zero_bytes = -(-self.groups * self.zero_bits // 8)

    def take_scales(self, data: Iterator[int]) -> None:
        raw = bytes(next(data) for _ in range(2 * self.rows * self.groups))
        self.scales = [x * 2.0**self.exponent for x in struct.unpack(f"<{self.rows * self.groups}e", raw)]

    def take_codes(self, data: Iterator[int]) -> Rows:
        codes = [bytes(next(data) for _ in range(self.row_bytes)) for _ in range(self.rows)]
        zeros = [bytes(next(data) for _ in range(self.zero_bytes)) for _ in range(self.rows)]
        return [self._row(r, codes[r], zeros[r]) for r in range(self.rows)]

    def _row(self, r: int, codes: bytes, zeros: bytes) -> list[float]:
        half = LLOYD_MAX.get(self.bits, (1.0,)) if self.family == "lm" else (1.0,)
        levels = [*(-x for x in reversed(half)), *half]
        if self.family == "half":
            stored: list[float] = list(struct.unpack(f"<{self.padded}e", codes))
        elif self.family == "int":
            stored = [byte - 128.0 for byte in codes]
        elif self.family == "trellis":
            stored = walked(codes, self.bits)
        elif self.family == "uniform":
            points = unpacked(zeros, self.zero_bits)
            stored = [
                float(c - points[i * self.groups // self.padded]) for i, c in enumerate(unpacked(codes, self.bits))
            ]
        else:
            stored = [levels[c] for c in unpacked(codes, self.bits)]
        scales = [self.scales[r * self.groups + i * self.groups // self.padded] if self.groups else 1.0
                  for i in range(self.width)]  # fmt: skip
        return [scale * value for scale, value in zip(scales, stored, strict=False)]


def by_the_page(directory: Path) -> dict[str, list[tuple[Rows, Rows]]]:
    """Blocks (A, B^T) of every module, read by docs/format.md alone."""
    raw = (directory / "adapter_model.bitloft.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    payload, table = (raw[8 + size :][slice(*header[name]["data_offsets"])] for name in ("payload", "table"))
    columns: dict[str, Any] = json.loads(zlib.decompress(table))
    tensors: list[tuple[str, Stored, Stored]] = []
    for name, shape, row in zip(columns["names"], columns["shape"], columns["blocks"], strict=True):
        inputs, outputs, _ = columns["shapes"][shape]
        for pair, k in zip(row[::2], row[1::2], strict=True):
            a, bt = columns["formats"][pair]
            exponents = columns["exponents"][len(tensors) if len(columns["exponents"]) > 1 else 0]
            tensors.append((name, Stored(a, k, inputs, exponents[0]), Stored(bt, k, outputs, exponents[1])))
    data = iter(payload)
    for _, first, second in tensors:
        first.take_scales(data)
        second.take_scales(data)
    found: dict[str, list[tuple[Rows, Rows]]] = {name: [] for name in columns["names"]}
    for name, first, second in tensors:
        a_rows = first.take_codes(data)
        found[name].append((a_rows, second.take_codes(data)))
    assert next(data, None) is None
    return found


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_page(name: str) -> None:
    modules = read_packed(HERE / name).modules
    other = by_the_page(HERE / name)
    assert set(other) == set(modules)
    for path, blocks in other.items():
        for (a, bt), block in zip(blocks, modules[path].blocks, strict=True):
            for rows, packed in ((a, block.a), (bt, block.bt)):
                found = decode(packed).tolist()
                assert len(rows) == len(found)
                for expected, got in zip(rows, found, strict=True):
                    assert got == pytest.approx(expected, rel=1e-6, abs=1e-30)


def corners(module: PackedModule) -> list[float]:
    """First and last entry of the product, and its squared norm."""
    pairs = [(decode(b.bt).double(), decode(b.a).double()) for b in module.blocks]
    dense = sum((bt.T @ a for bt, a in pairs[1:]), pairs[0][0].T @ pairs[0][1])
    return [float(dense[0, 0]), float(dense[-1, -1]), float(dense.square().sum())]


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_written_down(name: str) -> None:
    expected = json.loads((HERE / f"{name}.json").read_text())
    packed = read_packed(HERE / name)
    assert (packed.sha256, packed.true_bits) == (expected["sha256"], expected["true_bits"])
    assert math.isclose(packed.payload_bits, expected["payload_bits"])
    assert (packed.base, packed.source, packed.start) == ("0" * 64, "1" * 64, "frozen")
    for path, numbers in expected["products"].items():
        assert corners(packed.modules[path]) == pytest.approx(numbers, rel=1e-5, abs=1e-8)


def test_every_width_occurs() -> None:
    widths = {b.a.format.bits for m in read_packed(HERE / NAMES[0]).modules.values() for b in m.blocks}
    assert widths == {1, 2, 3, 4}


def test_trellis_codes_of_one_to_three_bits_occur() -> None:
    blocks = [b for m in read_packed(HERE / "adapter-trellis-1").modules.values() for b in m.blocks]
    assert {(b.a.format.family, b.bt.format.family) for b in blocks} == {("trellis", "trellis")}
    assert {side.format.bits for b in blocks for side in (b.a, b.bt)} == {1, 2, 3}


def test_sides_of_different_widths_occur() -> None:
    blocks = [b for m in read_packed(HERE / "adapter-waterfill-2").modules.values() for b in m.blocks]
    assert any(b.a.format.bits != b.bt.format.bits for b in blocks)
