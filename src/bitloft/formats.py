"""What a low-bit number is: a family of levels, a width in bits and a group that shares one scale.

One spelling everywhere (Python, CLI, files, reports), and ``Format.parse(str(f)) == f``::

    nf2:64      NormalFloat, 2 bits, one scale per 64 values along the last axis
    lm3:row     symmetric Lloyd-Max, 3 bits, one scale per row
    lm3:unit    the bare levels, no scale stored (a rank-1 product needs only one scale, kept by its other factor)
    uniform2:64 min-max grid with an integer zero point per group
    uniform2:tensor  one range per tensor, mean +- 2 standard deviations (what LoftQ's own GLUE code does)
    book2:64    four levels learned per matrix, for heavy tails
    sign:128    one bit, +-1, scale = mean of absolute values
    int8:row    8 bits, -127 to 127, the largest magnitude at the end
    trellis2:row     neighbouring codes share their choices (kernels/trellis.py); one scale per row, or none (:unit)
    trellis2:64      the same with one scale per 64 values of a row, codes running down the columns
                     (kernels/columnwise.py): what error feedback fills column by column
    half:unit   IEEE half precision, uncoded (half:row: one more scale per row)
    +dq         suffix: the scales themselves in 8 bits, with one range per 256 of them (QLoRA's double quantization)
    +shift      suffix: one fp16 shift per group (QA-LoRA merges into it)

All are ``value = scale * level[code] (+ shift)`` (``uniform`` without a shift: ``scale * (code - zero)``). This module
holds no tensor code: it answers what is stored, of which dtype and shape, before any tensor exists.
"""

import re
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

from bitloft.errors import FormatError

# NormalFloat levels are quantiles of a standard normal between these offsets (LoftQ's released code, QLoRA appendix E).
NF_OFFSET = 0.9677083

# bitsandbytes' published NF4 table, as decimal strings of its float32 values. LoftQ's recipe gives it to within 1e-7.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Positive halves of the symmetric Lloyd-Max quantizers of a standard normal (Max 1960, table I; solved to 1e-6 by
# tests/test_formats.py, which iterates the two Lloyd conditions).
LLOYD_MAX = {
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}

# group of a Format when it is not a number of values
ROW = 0  # one scale for the whole row
UNIT = -1  # no scale at all
TENSOR = -2  # one scale and one shift for the whole tensor
_NAMED = {"row": ROW, "unit": UNIT, "tensor": TENSOR}
_WIDTHLESS = {"sign": 1, "half": 16}  # families of one width, which their spelling leaves out
DQ_BLOCK = 256  # scales that share one range under +dq

_FAMILIES = {"nf": (2, 3, 4), "lm": (2, 3, 4), "uniform": (2, 3, 4), "book": (2, 3), "sign": (1,), "int": (8,),
             "half": (16,), "trellis": (1, 2, 3, 4)}  # fmt: skip
_SPELLING = re.compile(r"(nf|lm|uniform|book|sign|int|half|trellis)([0-9]*):([0-9]+|row|unit|tensor)(\+dq)?(\+shift)?")
KNOWN = (
    "nf2..4, lm2..4, uniform2..4, book2..3, sign, int8 or half, then ':' and a group (a multiple of 8, 'row', "
    "'unit', or 'tensor' for uniform), then '+dq' and '+shift' if wanted, such as lm2:64 or nf4:64+dq; or "
    "trellis1..4 with a group, :row or :unit"
)


class Part(NamedTuple):
    """One stored tensor of a PackedTensor: its dtype by name and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = {"int8": 1, "int16": 2, "int32": 4}[self.dtype]
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class Format:
    """How numbers are stored. ``group`` is a number of values, ``ROW`` (0), ``UNIT`` (-1) or ``TENSOR`` (-2).

    Raises FormatError for a family, width, group or suffix that does not exist.
    """

    family: str
    bits: int
    group: int
    dq: bool = False
    shift: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _FAMILIES.get(self.family, ()):
            raise FormatError(f"format {self}: no {self.family} code of {self.bits} bits exists; use {KNOWN}.")
        if self.group > 0 and self.group % 8:
            raise FormatError(f"format {self}: the group {self.group} is not a multiple of 8; use {KNOWN}.")
        if self.family == "half" and (self.group not in (ROW, UNIT) or self.dq or self.shift):
            raise FormatError(
                f"format {self}: half precision takes one scale a row or none; use half:row or half:unit."
            )
        if self.family == "trellis" and (self.group == TENSOR or self.dq or self.shift):
            raise FormatError(
                f"format {self}: trellis codes take plain scales, by group, one a row or none; "
                f"use trellis{self.bits}:64 or trellis{self.bits}:row."
            )
        if self.group == UNIT and self.family in ("uniform", "book", "int"):
            raise FormatError(f"format {self}: a {self.family} code needs a scale; use a group or 'row'.")
        if self.group == TENSOR and self.family != "uniform":
            raise FormatError(f"format {self}: only uniform codes take one range per tensor; use a group or 'row'.")
        if self.group < 0 and (self.dq or self.shift):
            raise FormatError(f"format {self}: '+dq' and '+shift' need groups; use a group or 'row'.")

    @classmethod
    def parse(cls, text: "str | Format") -> "Format":
        """Read a spelling such as ``lm2:64``. A Format passes through."""
        if isinstance(text, Format):
            return text
        match = _SPELLING.fullmatch(text.strip())
        if match is None or (match[1] in _WIDTHLESS) == bool(match[2]):
            raise FormatError(f"unknown format {text!r}; use {KNOWN}.")
        group = _NAMED[match[3]] if match[3] in _NAMED else int(match[3])
        if group == 0 and match[3] != "row":
            raise FormatError(f"format {text!r}: a group of 0 values does not exist; use {KNOWN}.")
        bits = _WIDTHLESS.get(match[1]) or int(match[2])
        return cls(match[1], bits, group, bool(match[4]), bool(match[5]))

    def __str__(self) -> str:
        bits = "" if self.family in _WIDTHLESS else str(self.bits)
        group = {value: name for name, value in _NAMED.items()}.get(self.group, self.group)
        return f"{self.family}{bits}:{group}{'+dq' * self.dq}{'+shift' * self.shift}"

    @property
    def levels(self) -> tuple[float, ...]:
        """The level of each code, ascending; 2**bits of them. ``uniform`` has 0, 1, ... before its zero point or shift;
        ``book`` starts from Lloyd-Max levels and stores what it learned with the tensor; ``half`` has no table, nor has
        ``trellis``, whose codes mean nothing alone."""
        return _levels(self.family, self.bits)

    @property
    def by_column(self) -> bool:
        """True where the codes of a column, not of a row, lie together: of trellis codes with groups."""
        return self.family == "trellis" and self.group > 0

    @property
    def has_levels(self) -> bool:
        """True where the levels are stored with the tensor."""
        return self.family == "book"

    @property
    def has_shifts(self) -> bool:
        """True where each group (or the tensor) stores an fp16 shift."""
        return self.shift or self.group == TENSOR

    @property
    def has_zeros(self) -> bool:
        """True where each group stores an integer zero point of ``bits`` bits."""
        return self.family == "uniform" and not self.has_shifts

    def width(self, columns: int) -> int:
        """Columns after padding: a multiple of the group, and of 8 so that every bit plane fills whole bytes."""
        unit = self.group if self.group > 0 else 8
        return -(-columns // unit) * unit

    def groups(self, columns: int) -> int:
        """Scales stored per row of ``columns`` values (TENSOR: per tensor)."""
        if self.group == UNIT:
            return 0
        return self.width(columns) // self.group if self.group > 0 else min(columns, 1)

    def group_size(self, columns: int) -> int:
        """Values that share one scale in a row of ``columns`` values, padding included."""
        return self.group if self.group > 0 else self.width(columns)


@cache
def _levels(family: str, bits: int) -> tuple[float, ...]:
    if family == "sign":
        return (-1.0, 1.0)
    if family == "uniform":
        return tuple(float(i) for i in range(2**bits))
    if family == "int":
        return tuple(float(i - 128) for i in range(256))
    if family in ("half", "trellis"):
        return ()
    if family in ("lm", "book"):
        half = LLOYD_MAX[bits]
        return tuple(-x for x in reversed(half)) + half
    return NF4_LEVELS if bits == 4 else _normal_float(bits)


def _normal_float(bits: int) -> tuple[float, ...]:
    """NormalFloat levels: 2**(b-1) positive quantiles, zero, 2**(b-1) - 1 negative ones (LoftQ's released code)."""
    quantile = NormalDist().inv_cdf
    count = 2 ** (bits - 1)

    def side(n: int) -> list[float]:
        step = (NF_OFFSET - 0.5) / n
        return [quantile(NF_OFFSET - i * step) for i in range(n)]

    values = sorted([*(-v for v in side(count - 1)), 0.0, *side(count)])
    # the negative side has one level fewer: its outermost quantile is the same, so both ends are +-1
    return tuple(v / values[-1] for v in values)


def layout(shape: tuple[int, ...], fmt: Format) -> dict[str, Part]:
    """Names, dtypes and shapes of the stored parts of a tensor of ``shape`` in ``fmt``; no data needed.

    ``codes`` int8 [rows, width*bits/8], ``by_column`` [columns, ceil(rows/8)*bits]; ``scales`` int16 [rows, groups],
    fp16 bit patterns in units of 2**``exponent`` (int32 []). As the format asks: ``zeros`` int8
    [rows, ceil(groups*bits/8)] (4 bits each where codes take 3), ``shifts`` int16 like scales, ``levels`` int16
    [2**bits] (fp16 patterns); with +dq ``scales`` are int8 codes, and ``scale_low`` and ``scale_step`` int16
    [ceil(rows*groups/256)] their ranges. TENSOR has one scale and one shift.
    Raises FormatError for a scalar shape.
    """
    if not shape:
        raise FormatError(f"format {fmt} needs a tensor of at least one axis; a scalar cannot be packed.")
    columns, rows = shape[-1], 1
    for n in shape[:-1]:
        rows *= n
    groups = fmt.groups(columns)
    scaled = (min(rows, 1), groups) if fmt.group == TENSOR else (rows, groups)
    parts = {
        "codes": Part("int8", _codes_shape(rows, columns, fmt)),
        "scales": Part("int8" if fmt.dq else "int16", scaled),
        "exponent": Part("int32", ()),
    }
    if fmt.has_zeros:
        zero_bits = 4 if fmt.bits == 3 else fmt.bits  # a zero point never straddles bytes
        parts["zeros"] = Part("int8", (rows, -(-groups * zero_bits // 8)))
    if fmt.has_shifts:
        parts["shifts"] = Part("int16", scaled)
    if fmt.has_levels:
        parts["levels"] = Part("int16", (2**fmt.bits,))
    if fmt.dq:
        blocks = -(-rows * groups // DQ_BLOCK)
        parts |= {"scale_low": Part("int16", (blocks,)), "scale_step": Part("int16", (blocks,))}
    return parts


def _codes_shape(rows: int, columns: int, fmt: Format) -> tuple[int, int]:
    if fmt.by_column:
        return columns, -(-rows // 8) * fmt.bits
    return rows, fmt.width(columns) * fmt.bits // 8
