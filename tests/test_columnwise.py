"""Trellis codes that run down columns: native products and values against the definition, odd sizes, both orders."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.errors import KernelError
from bitloft.formats import Format, layout
from bitloft.kernels import cpu, cpu_dequantize, cpu_linear, operators, ops, plain
from bitloft.packed import DTYPES, PackedTensor
from tests.helpers import assert_product

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no native library was built")

FORMATS = ["trellis1:64", "trellis2:8", "trellis2:64", "trellis3:128", "trellis4:40", "trellis2:512"]
SHAPES = [(1, 1), (5, 72), (72, 130), (128, 1024), (200, 136), (130, 576), (0, 64)]
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
ARRANGED = pytest.mark.skipif(cpu.isa() != "avx512", reason="only AVX-512 has another order")


def packed(spelling: str, rows: int, columns: int, seed: int = 0) -> PackedTensor:
    """Any codes, for all of them stand for something, and scales between 1/8 and 2."""
    random, fmt, parts = torch.Generator().manual_seed(seed), Format.parse(spelling), {}
    for name, part in layout((rows, columns), fmt).items():
        low, high = (-128, 128) if name == "codes" else (0x3000, 0x4000)
        parts[name] = torch.randint(low, high, part.shape, generator=random).to(DTYPES[part.dtype])
    parts["exponent"].zero_()
    return PackedTensor.from_tensors(fmt, (rows, columns), parts)


def copied(weight: PackedTensor) -> PackedTensor:
    return replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_products_are_those_of_the_definition(spelling: str, shape: tuple[int, int]) -> None:
    weight = packed(spelling, *shape)
    cpu.check(weight)
    dense = plain.decode(weight)
    for dtype in INPUTS:
        assert torch.equal(ops.decode(weight, dtype), plain.decode(weight, dtype))
        for batch in [(), (0,), (1,), (2,), (3, 2), (33,)]:
            x = torch.randn(*batch, shape[1]).to(dtype)
            assert_product(x, ops.packed_linear(x, weight), dense)
        grad = torch.randn(3, shape[0]).to(dtype)
        assert_product(grad, ops.packed_linear_grad_input(grad, weight), dense.to(dtype).T)  # torch's
    if shape[0]:
        index = torch.tensor([shape[0] - 1, 0])
        assert torch.equal(ops.decode_rows(weight, index), dense[index])


def test_leading_axes_and_the_residual() -> None:
    fmt = Format.parse("trellis2:64")
    stack = replace(packed("trellis2:64", 21, 130), shape=(3, 7, 130))
    assert stack.format == fmt
    assert torch.equal(ops.decode(stack), plain.decode(stack))
    x, out = torch.randn(3, 7, 130), torch.empty(3, 7, 130)
    assert ops.residual(x, stack, out=out) == pytest.approx(plain.residual(x, stack, None))
    assert torch.equal(out, x - plain.decode(stack))


def test_many_rows_are_multiplied_from_tiles() -> None:
    weight = packed("trellis2:64", 200, 128)
    x, bias = torch.randn(ops.MANY, 128).bfloat16(), torch.randn(200)
    exact = x.float() @ ops.decode(weight).T + bias
    error = (ops.packed_linear(x, weight, bias=bias).float() - exact).norm() / exact.norm()
    assert float(error) < 6e-3  # levels times scales are rounded too
    wide = packed("trellis3:64", 200, 1 << 15)  # more values than one tile has
    assert len(list(cpu_dequantize.tiles(wide, torch.float32))) == 4
    assert torch.equal(torch.cat([t.clone() for _, t in cpu_dequantize.tiles(wide, torch.float16)]),
                       plain.decode(wide, torch.float16))  # fmt: skip


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("dtype", INPUTS)
def test_rows_do_not_see_each_other(spelling: str, dtype: torch.dtype) -> None:
    weight = packed(spelling, 100, 192)
    x = torch.randn(33, 192).to(dtype)
    x[torch.tensor([0, 4, 32]), 7] = float("nan")  # rows for another kernel change nothing for those between them
    x[9] *= 1e30
    whole = ops.packed_linear(x, weight, invariant=True)
    for rows in (1, 2, 3, 5, 13):
        assert torch.equal(ops.packed_linear(x[:rows], weight).nan_to_num(7.0), whole[:rows].nan_to_num(7.0))
    assert whole[[0, 4, 32]].isnan().all()
    assert whole[[1, 2, 3, 31]].isfinite().all()


@ARRANGED
@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("shape", [(5, 72), (64, 128), (72, 136), (128, 1024), (200, 576)])
def test_arranged_codes_give_the_same_bits(spelling: str, shape: tuple[int, int]) -> None:
    stored = packed(spelling, *shape)
    arranged = cpu_linear.arrange(copied(stored))
    if shape[0] >= 64:
        assert not torch.equal(arranged.codes, stored.codes)
    for dtype in INPUTS:
        for rows in (1, 4, 9):
            x = torch.randn(rows, shape[1]).to(dtype)
            assert torch.equal(ops.packed_linear(x, arranged), ops.packed_linear(x, stored))
    x[0, 3] = float("inf")  # as float32
    assert torch.equal(ops.packed_linear(x, arranged).nan_to_num(7.0), ops.packed_linear(x, stored).nan_to_num(7.0))
    grad = torch.randn(3, shape[0])
    assert torch.equal(ops.packed_linear_grad_input(grad, arranged), ops.packed_linear_grad_input(grad, stored))
    back = cpu_linear.canonical(arranged)
    assert torch.equal(back.codes, stored.codes)
    assert torch.equal(back.scales, stored.scales)


def test_columns_that_fill_no_cells_have_no_other_order() -> None:
    assert not cpu_linear.can_arrange(Format.parse("trellis2:64"), 130)
    with pytest.raises(KernelError, match=r"trellis2:64 tensor of shape \(64, 130\) has no other order"):
        cpu_linear.arrange(packed("trellis2:64", 64, 130))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.sampled_from([8, 24, 64, 128, 320]), st.integers(1, 200), st.integers(1, 400),
    st.integers(1, 40), st.sampled_from(INPUTS), st.integers(0, 2**31),
)  # fmt: skip
def test_any_size(bits: int, group: int, rows: int, columns: int, count: int, dtype: torch.dtype, seed: int) -> None:
    weight = packed(f"trellis{bits}:{group}", rows, columns, seed)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = ops.packed_linear(x, weight)
    assert_product(x, y, plain.decode(weight))
    if cpu_linear.can_arrange(weight.format, columns):
        assert torch.equal(ops.packed_linear(x, cpu_linear.arrange(weight)), y)


def test_one_row_of_float32_is_as_exact_as_float32() -> None:
    for spelling in ("trellis2:64", "trellis3:512"):
        weight = packed(spelling, 200, 1024)
        dense = plain.decode(weight).double()
        for x in (torch.randn(1, 1024), torch.randn(1, 1024) * torch.logspace(0, 4, 1024), torch.eye(1024)[:1] * 3e7):
            exact = x.double() @ dense.T
            slack = 3e-7 * float(x.abs().max() * dense.abs().max()) * (1 if "64" in spelling else 4)
            found = ops.packed_linear(x, weight).double()
            assert float((found - exact).abs().max()) <= slack + 1e-6 * float(exact.abs().max())


def test_input_and_scales_of_any_size() -> None:
    weight = packed("trellis2:64", 70, 128)
    dense = plain.decode(weight).double()
    for factor in (1e-38, 1e-30, 1e30, 1e34):
        x = torch.randn(1, 128) * factor
        exact = x.double() @ dense.T
        error = float((ops.packed_linear(x, weight).double() - exact).abs().max() / exact.abs().max())
        assert error < (1e-2 if factor < 1e-35 else 1e-6)
    for exponent in (-120, 90, 105):
        small = replace(copied(weight), exponent=torch.tensor(exponent, dtype=torch.int32))
        x = torch.randn(2, 128)
        exact = x.double() @ plain.decode(small).double().T
        for held in (small, cpu_linear.arrange(copied(small)) if cpu.isa() == "avx512" else small):
            found = ops.packed_linear(x, held).double()
            assert float((found - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


@pytest.mark.skipif(not cpu_linear.takes_int8(), reason="no AVX-512 kernels here")
@pytest.mark.parametrize("spelling", FORMATS)
def test_products_in_8_bits_are_those_of_the_definition(spelling: str) -> None:
    weight, bias = packed(spelling, 130, 200), torch.randn(130)
    for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        x = (torch.randn(7, 200) * torch.rand(7, 1)).to(dtype)
        exact = plain.rounded_linear(x, weight, "int8") + bias
        found = ops.packed_linear(x, weight, bias=bias, activations="int8")
        assert float((found.float() - exact).abs().max()) <= slack * float(exact.abs().max())
        assert torch.equal(ops.packed_linear(x[3], weight, bias=bias, activations="int8"), found[3])
    x = torch.zeros(3, 200)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    found = ops.packed_linear(x, weight, activations="int8")
    assert torch.equal(found[0], torch.zeros(130))
    assert not found[1:].isfinite().any()


def test_bias_and_addend_are_added_before_rounding() -> None:
    weight = packed("trellis2:64", 70, 64)
    bias, addend = torch.randn(70) * 1e-3, torch.randn(2, 3, 70) * 1e-3
    x = torch.zeros(2, 3, 64, dtype=torch.bfloat16)
    assert torch.equal(ops.packed_linear(x, weight, bias=bias, addend=addend), (addend + bias).bfloat16())


def test_nothing_depends_on_the_number_of_threads() -> None:
    weight, x, threads = packed("trellis2:64", 600, 2048), torch.randn(5, 2048), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append((ops.packed_linear(x, weight), ops.packed_linear(x[:1], weight), ops.decode(weight)))
    torch.set_num_threads(threads)
    for one, other in zip(found[0] * 2, (*found[1], *found[2]), strict=True):
        assert torch.equal(one, other)


def test_the_operator_traces_and_has_gradients() -> None:
    weight = packed("trellis2:64", 72, 128)
    x = torch.randn(3, 128, requires_grad=True)
    y = torch.ops.bitloft.packed_linear(x, *operators.flat(weight))
    y.sum().backward()
    torch.testing.assert_close(x.grad, plain.decode(weight).sum(0).expand(3, 128))
    parts = operators.flat(weight)
    with torch.no_grad():
        again = torch.compile(lambda x: torch.ops.bitloft.packed_linear(x, *parts), backend="eager", fullgraph=True)
        assert torch.equal(again(x), y)


def test_sizes_are_checked_in_c() -> None:
    weight = packed("trellis2:64", 70, 64)
    x = torch.randn(1, 64)

    def refused(field: str, value: int) -> str:
        held = cpu_linear.Weight(weight)
        setattr(held.matrix, field, value)
        with pytest.raises(KernelError) as error:
            cpu_linear.packed_linear(x, held)
        return str(error.value)

    assert "bytes of codes" in refused("codes_bytes", 64 * 17)
    assert "bytes of codes" in refused("rows", 73)
    assert "bytes of them" in refused("scales_bytes", 2)
    assert "run down columns are those of a trellis" in refused("flags", cpu.COLUMNS)
    out = torch.empty(64, 70)
    call = cpu_dequantize._columns_function()
    matrix = cpu.matrix(weight)
    for row, rows, kind, words in ((3, 67, 0, "67 rows from 3 on"), (0, 71, 0, "71 rows"), (0, 70, 7, "no dtype 7")):
        with pytest.raises(KernelError, match=words):
            cpu.done(call(matrix, row, rows, out.data_ptr(), out.nbytes, kind, 1))
    with pytest.raises(KernelError, match="the rows of codes that run along the others"):
        cpu.done(cpu_dequantize._function()(matrix, None, 70, out.data_ptr(), out.nbytes, 0, 1))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_product(isa: str) -> None:
    code = (
        "import torch; from bitloft.kernels import cpu_linear, ops, plain; from tests.test_columnwise import packed\n"
        "for fmt in ('trellis1:64', 'trellis2:64', 'trellis3:8', 'trellis4:128'):\n"
        "    w = packed(fmt, 200, 328); dense = plain.decode(w)\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "        assert torch.equal(ops.decode(w, dtype), plain.decode(w, dtype)), fmt\n"
        "        x = torch.randn(9, 328).to(dtype); y = ops.packed_linear(x, w); e = x.double() @ dense.double().T\n"
        "        bound = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]\n"
        "        assert (y.double() - e).abs().max() < bound * e.abs().max(), fmt\n"
        "        assert torch.equal(ops.packed_linear(x[:1], w, invariant=True), y[:1]), fmt\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "BITLOFT_ISA": isa}
    )
    if "which this processor does not have" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert not done.returncode, done.stderr
