"""Triton kernels over packed tensors: dequantize, and the product with a packed matrix or its transpose.

Every kernel reads codes and scales as the file holds them, through one device function (``_values``) that knows all
formats; what a format lacks is masked off, and where the description is a compile-time constant the compiler removes
it. One generic reader was preferred to a kernel for each format: twenty formats times three kernels would have to be
timed one by one on a GPU. This module imports triton; ``gpu`` imports this module only where triton is there.
``no_type_check`` keeps the tests' argument checker off: Triton compiles the functions' own source.
"""

from typing import no_type_check

import triton
import triton.language as tl


@no_type_check
@triton.jit
def _values(
    codes, scales, exponent, zeros, shifts, levels, low, step, row, column, inside, row_bytes, width, group, groups,
    bits, scaled, one_range, dq, zero_bits, shifted,
):  # fmt: skip
    """Values [rows, columns] in float32 at ``row`` [rows] and ``column`` [columns]; 0 where not ``inside``."""
    r, c = row[:, None].to(tl.int64), column[None, :]
    at = codes + r * row_bytes
    planes = bits == 3  # a plane of two bits and one of one bit
    narrow = 2 if planes else bits
    if bits == 32:  # plain float32
        value = tl.load((at + 4 * c).to(tl.pointer_type(tl.float32)), inside, 0.0)
    elif bits == 16:  # fp16, at any byte
        pattern = tl.load(at + 2 * c, inside, 0).to(tl.int32) | tl.load(at + 2 * c + 1, inside, 0).to(tl.int32) << 8
        value = pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif bits > 64:  # planes of trellis codes: a window of nine bits of the first, and one bit of each other
        ends = width // 8
        first = (c // 8 + ends - 1) % ends
        pair = tl.load(at + first, inside, 0).to(tl.int32) | tl.load(at + c // 8, inside, 0).to(tl.int32) << 8
        code = pair >> (c % 8) & 511
        for plane in range(1, bits - 64):
            code |= (tl.load(at + plane * ends + c // 8, inside, 0).to(tl.int32) >> (c % 8) & 1) << (8 + plane)
        value = tl.load(levels + code, inside, 0.0)
    else:  # codes of a level table
        code = tl.load(at + c * narrow // 8, inside, 0).to(tl.int32) >> (c * narrow % 8) & ((1 << narrow) - 1)
        if planes:
            code |= (tl.load(at + width // 4 + c // 8, inside, 0).to(tl.int32) >> (c % 8) & 1) << 2
        value = tl.load(levels + code, inside, 0.0)
    if scaled:
        place = c // group
        at_scale = r * 0 + place * 0 if one_range else r * groups + place
        unit = tl.load(exponent)
        if dq:
            block = at_scale // 256
            scale = _half(low + block, inside, unit) + _half(step + block, inside, unit) * tl.load(
                scales.to(tl.pointer_type(tl.uint8)) + at_scale, inside, 0
            ).to(tl.float32)
        else:
            scale = _half(scales + at_scale, inside, unit)
        if zero_bits:
            lane = place * zero_bits
            zero_bytes = (groups * zero_bits + 7) // 8
            found = tl.load(zeros + r * zero_bytes + lane // 8, inside, 0).to(tl.int32)
            value -= (found >> (lane % 8) & ((1 << zero_bits) - 1)).to(tl.float32)
        value *= scale
        if shifted:
            value += _half(shifts + at_scale, inside, unit)
    return tl.where(inside, value, 0.0)


@no_type_check
@triton.jit
def _half(at, inside, unit):
    """fp16 patterns in units of 2**unit, as float32; the power in two factors, for one may leave float32's range."""
    value = tl.load(at, inside, 0).to(tl.float16, bitcast=True).to(tl.float32)
    first = unit // 2
    return value * tl.exp2(first.to(tl.float32)) * tl.exp2((unit - first).to(tl.float32))


@no_type_check
@triton.jit
def dequantize(
    codes, scales, exponent, zeros, shifts, levels, low, step, out, rows, columns,
    row_bytes, width, group, groups, bits: tl.constexpr, scaled: tl.constexpr, one_range: tl.constexpr,
    dq: tl.constexpr, zero_bits: tl.constexpr, shifted: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[rows, columns] = values; one program a tile [BR, BC]."""
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = _values(
        codes, scales, exponent, zeros, shifts, levels, low, step, row, column, inside, row_bytes, width, group,
        groups, bits, scaled, one_range, dq, zero_bits, shifted,
    )  # fmt: skip
    at = out + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(at, tile.to(out.dtype.element_ty), inside)


@no_type_check
@triton.jit
def few(
    codes, scales, exponent, zeros, shifts, levels, low, step, x, y, rows, columns,
    row_bytes, width, group, groups, bits: tl.constexpr, scaled: tl.constexpr, one_range: tl.constexpr,
    dq: tl.constexpr, zero_bits: tl.constexpr, shifted: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[n, rows] = x[n, columns] @ values.T for few n: a program has BR outputs of one n and sums over all columns.

    The sum runs in one order whatever n is, and its neighbours never enter it.
    """
    n, row = tl.program_id(1), tl.program_id(0) * BR + tl.arange(0, BR)
    total = tl.zeros([BR], tl.float32)
    for first in range(0, columns, BC):
        column = first + tl.arange(0, BC)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tile = _values(
            codes, scales, exponent, zeros, shifts, levels, low, step, row, column, inside, row_bytes, width, group,
            groups, bits, scaled, one_range, dq, zero_bits, shifted,
        )  # fmt: skip
        given = tl.load(x + n * columns + column, column < columns, 0.0).to(tl.float32)
        total += tl.sum(tile * given[None, :], axis=1)
    tl.store(y + n * rows + row, total.to(y.dtype.element_ty), row < rows)


@no_type_check
@triton.jit
def many(
    codes, scales, exponent, zeros, shifts, levels, low, step, x, y, count, rows, columns,
    row_bytes, width, group, groups, bits: tl.constexpr, scaled: tl.constexpr, one_range: tl.constexpr,
    dq: tl.constexpr, zero_bits: tl.constexpr, shifted: tl.constexpr, transposed: tl.constexpr,
    dtype: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """y[count, rows] = x[count, columns] @ values.T; ``transposed``: y[count, columns] = x[count, rows] @ values.

    A program has the tile [BN, BO] of y and multiplies tiles in ``dtype``, summing in float32.
    """
    outer, inner = (columns, rows) if transposed else (rows, columns)
    n, o = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros([BN, BO], tl.float32)
    for first in range(0, inner, BI):
        i = first + tl.arange(0, BI)
        row, column = (i, o) if transposed else (o, i)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tile = _values(
            codes, scales, exponent, zeros, shifts, levels, low, step, row, column, inside, row_bytes, width, group,
            groups, bits, scaled, one_range, dq, zero_bits, shifted,
        ).to(dtype)  # fmt: skip
        wanted = (n < count)[:, None] & (i < inner)[None, :]
        given = tl.load(x + n[:, None].to(tl.int64) * inner + i[None, :], wanted, 0.0).to(dtype)
        total += tl.dot(given, tile if transposed else tl.trans(tile), input_precision="ieee")
    at = y + n[:, None].to(tl.int64) * outer + o[None, :]
    tl.store(at, total.to(y.dtype.element_ty), (n < count)[:, None] & (o < outer)[None, :])


# multi_lora: one row of ``table`` for each block, FACTOR numbers for A, as many for Bt, then its components
FACTOR: tl.constexpr = tl.constexpr(16)
BLOCK: tl.constexpr = tl.constexpr(2 * 16 + 1)


@no_type_check
@triton.jit
def _factor(at, row, column, inside):
    """Values of one factor, as the sixteen numbers from ``at`` describe it."""
    scales = _number(at + 13)  # 0: none, 1: fp16, 2: double quantized
    return _values(
        tl.load(at).to(tl.pointer_type(tl.uint8)), tl.load(at + 1).to(tl.pointer_type(tl.int16)),
        tl.load(at + 2).to(tl.pointer_type(tl.int32)), tl.load(at + 3).to(tl.pointer_type(tl.uint8)),
        tl.load(at + 4).to(tl.pointer_type(tl.int16)), tl.load(at + 5).to(tl.pointer_type(tl.float32)),
        tl.load(at + 6).to(tl.pointer_type(tl.int16)), tl.load(at + 7).to(tl.pointer_type(tl.int16)),
        row, column, inside, _number(at + 8), _number(at + 9), _number(at + 10), _number(at + 11), _number(at + 12),
        scales > 0, False, scales > 1, _number(at + 14), _number(at + 15) > 0,
    )  # fmt: skip


@no_type_check
@triton.jit
def _number(at):
    return tl.load(at).to(tl.int32)


@no_type_check
@triton.jit
def lora_down(table, lists, begin, places, scalings, x, t, columns, most, BR: tl.constexpr, BC: tl.constexpr):
    """t[n, place .. ] = scaling * (A @ x[n]) for every block of row n; a program has one row and one of its blocks."""
    n, i = tl.program_id(0), tl.load(begin + tl.program_id(0)) + tl.program_id(1)
    if i < tl.load(begin + n + 1):
        block = tl.load(lists + i)
        at = table + block * BLOCK
        components, scaling = _number(at + 2 * FACTOR), tl.load(scalings + block)
        for k in range(0, components, BR):
            row = k + tl.arange(0, BR)
            total = tl.zeros([BR], tl.float32)
            for first in range(0, columns, BC):
                column = first + tl.arange(0, BC)
                inside = (row < components)[:, None] & (column < columns)[None, :]
                given = tl.load(x + n * columns + column, column < columns, 0.0).to(tl.float32)
                total += tl.sum(_factor(at, row, column, inside) * given[None, :], axis=1)
            tl.store(t + n * most + tl.load(places + i) + row, total * scaling, row < components)


@no_type_check
@triton.jit
def lora_up(table, lists, begin, places, t, y, features, most, BR: tl.constexpr, BC: tl.constexpr):
    """y[n] = sum over the blocks of row n of t @ Bt, in the order of its list; a program has one row and BC outputs."""
    n, column = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for i in range(tl.load(begin + n), tl.load(begin + n + 1)):
        at = table + tl.load(lists + i) * BLOCK
        components = _number(at + 2 * FACTOR)
        for k in range(0, components, BR):
            row = k + tl.arange(0, BR)
            inside = (row < components)[:, None] & (column < features)[None, :]
            weight = tl.load(t + n * most + tl.load(places + i) + row, row < components, 0.0)
            total += tl.sum(_factor(at + FACTOR, row, column, inside) * weight[:, None], axis=0)
    tl.store(y + n * features + column, total, column < features)
