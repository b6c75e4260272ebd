"""The native product against the definition: all formats, odd sizes, both orders of codes, any number of rows."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.errors import KernelError
from bitloft.formats import Format
from bitloft.kernels import cpu, cpu_linear, ops, plain
from tests.helpers import assert_product
from tests.test_formats import FORMATS

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no native library was built")

TAKEN = [f for f in FORMATS if cpu_linear.multiplies(Format.parse(f))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_what_is_taken() -> None:
    left = {f for f in FORMATS if f not in TAKEN and not f.startswith("trellis")}
    assert left == {"int8:64", "int8:row", "half:row", "half:unit"}
    taken = {f for f in TAKEN if f.startswith("trellis")}  # those along rows are for adapters
    assert taken == {f for f in FORMATS if Format.parse(f).by_column}
    assert not cpu_linear.multiplies(Format.parse("lm2:8"))  # a group of half a word
    assert cpu_linear.multiplies(Format.parse("lm4:8"))


@pytest.mark.parametrize("spelling", TAKEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (127, 576), (65, 130), (192, 128), (0, 64)])
def test_products_are_those_of_the_decoded_matrix(spelling: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = plain.encode(torch.randn(shape), spelling)
    dense = plain.decode(weight)
    for batch in [(), (0,), (1,), (2,), (3, 2), (7,), (33,)]:
        x = torch.randn(*batch, shape[1]).to(dtype)
        assert_product(x, ops.packed_linear(x, weight), dense)


@pytest.mark.parametrize("spelling", TAKEN)
@pytest.mark.parametrize("shape", [(127, 576), (64, 128), (200, 256)])
def test_arranged_codes_give_the_same_bits(spelling: str, shape: tuple[int, int]) -> None:
    weight = plain.encode(torch.randn(shape), spelling)
    stored = replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())
    arranged = cpu_linear.arrange(weight)
    assert not torch.equal(arranged.codes, stored.codes)
    for dtype in DTYPES:
        for rows in (1, 4, 9):
            x = torch.randn(rows, shape[1]).to(dtype)
            assert torch.equal(ops.packed_linear(x, arranged), ops.packed_linear(x, stored))
    grad = torch.randn(3, shape[0])
    assert torch.equal(ops.packed_linear_grad_input(grad, arranged), ops.packed_linear_grad_input(grad, stored))
    back = cpu_linear.canonical(arranged)
    assert torch.equal(back.codes, stored.codes)
    assert torch.equal(back.scales, stored.scales)
    assert arranged.codes.data_ptr() == weight.codes.data_ptr()  # in place, same size
    with pytest.raises(KernelError, match="is arranged already"):
        cpu_linear.arrange(arranged)
    cpu_linear.restore(arranged)
    assert torch.equal(weight.codes, stored.codes)
    with pytest.raises(KernelError, match="is not arranged"):
        cpu_linear.restore(weight)


def test_tail_rows_keep_their_order() -> None:
    weight = plain.encode(torch.randn(70, 64), "lm3:64")
    tail = weight.codes[64:].clone()
    assert torch.equal(cpu_linear.arrange(weight).codes[64:], tail)


def test_a_row_that_fills_no_words_has_no_other_order() -> None:
    weight = plain.encode(torch.randn(64, 24), "lm2:row")
    assert not cpu_linear.can_arrange(weight.format, 24)
    with pytest.raises(KernelError, match=r"lm2:row tensor of shape \(64, 24\) has no other order"):
        cpu_linear.arrange(weight)


@pytest.mark.parametrize("spelling", TAKEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_rows_do_not_see_each_other(spelling: str, dtype: torch.dtype) -> None:
    weight = plain.encode(torch.randn(100, 192), spelling)
    x = torch.randn(33, 192).to(dtype)
    whole = ops.packed_linear(x, weight, invariant=True)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 32):
        assert torch.equal(ops.packed_linear(x[:rows], weight, invariant=True), whole[:rows])
    x[torch.tensor([0, 4, 5, 32]), 7] = float("nan")  # rows for another kernel change nothing for those between them
    x[9] *= 1e30
    mixed = ops.packed_linear(x, weight, invariant=True)
    others = torch.tensor([row for row in range(33) if row not in (0, 4, 5, 9, 32)])
    assert torch.equal(mixed[others], whole[others])
    for row in range(33):
        alone = ops.packed_linear(x[row : row + 1], weight, invariant=True)
        assert torch.equal(alone.nan_to_num(7.0), mixed[row : row + 1].nan_to_num(7.0))


@pytest.mark.parametrize(
    "spelling", ["sign:128", "lm2:64", "book2:64", "lm3:64", "nf4:64", "lm2:row", "nf4:row", "lm3:row+dq"]
)
def test_one_row_of_float32_is_as_exact_as_float32(spelling: str) -> None:
    weight = plain.encode(torch.randn(200, 1024), spelling)
    dense = plain.decode(weight).double()
    for kind in (torch.randn(1, 1024), torch.randn(1, 1024) * torch.logspace(0, 4, 1024), torch.eye(1024)[:1] * 3e7):
        exact = kind.double() @ dense.T
        # as float32's running sums, to which it is held: of the largest products of each group
        slack = 3e-7 * float(kind.abs().max() * dense.abs().max()) * (1 if "64" in spelling else 8)
        found = ops.packed_linear(kind, weight).double()
        assert float((found - exact).abs().max()) <= slack + 1e-6 * float(exact.abs().max())
    brain = torch.randn(1, 1024).bfloat16()
    exact = brain.double() @ dense.T
    error = (ops.packed_linear(brain, weight).double() - exact).norm() / exact.norm()
    assert float(error) < 4e-3


@pytest.mark.parametrize("spelling", ["sign:128", "lm2:64", "lm2:32", "uniform2:64", "lm2:row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_few_bits_get_what_one_gets(spelling: str, dtype: torch.dtype) -> None:
    """On AVX-512 sums are whole numbers, which no other row can change, wherever their tables are made."""
    if cpu.isa() != "avx512":
        pytest.skip("other instruction sets add the products of one row in another order")
    weight = plain.encode(torch.randn(300, 576), spelling)
    for packed in (weight, cpu_linear.arrange(plain.encode(plain.decode(weight), spelling))):
        x = (torch.randn(300, 576) * torch.logspace(-3, 2, 300)[:, None]).to(dtype)
        alone = torch.cat([ops.packed_linear(row, packed) for row in x.split(1)])
        for rows in (2, 3, 4, 5, 6, 7, 8):
            assert torch.equal(ops.packed_linear(x[:rows], packed), alone[:rows])
        for rows in (19, 300):  # where scales are turned first, bfloat16 may take another way
            assert torch.equal(ops.packed_linear(x[:rows], packed, invariant=True), alone[:rows])
            usual = ops.packed_linear(x[:rows], packed)
            if packed.arranged and not spelling.startswith("uniform"):
                assert torch.equal(usual, alone[:rows])
            assert float((usual.double() - alone[:rows].double()).norm() / alone[:rows].double().norm()) < 4e-3


@pytest.mark.parametrize("spelling", ["sign:128", "lm2:64", "lm3:64", "nf4:64", "uniform2:64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_few_rows_with_what_is_no_number(spelling: str, dtype: torch.dtype, rows: int) -> None:
    weight = plain.encode(torch.randn(70, 130), spelling)
    for value in (float("nan"), float("inf"), -float("inf")):
        for at in (0, 63, 129):
            x = torch.randn(rows, 130).to(dtype)
            x[-1, at] = value
            found, expected = ops.packed_linear(x, weight), x.double() @ plain.decode(weight).double().T
            assert torch.equal(found.isfinite(), expected.isfinite())


def test_one_row_of_any_size() -> None:
    weight = plain.encode(torch.randn(64, 128), "lm2:64")
    for factor in (1e-38, 1e-30, 1e30, 1e36):
        x = torch.randn(1, 128) * factor
        exact = x.double() @ plain.decode(weight).double().T
        found = ops.packed_linear(x, weight).double()
        assert float((found - exact).abs().max() / exact.abs().max()) < (1e-2 if factor < 1e-35 else 1e-6)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_nothing_depends_on_the_number_of_threads(rows: int) -> None:
    weight = plain.encode(torch.randn(300, 2048), "lm2:64")
    x = torch.randn(rows, 2048)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(ops.packed_linear(x, weight))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bias_and_addend_are_added_before_rounding() -> None:
    weight = plain.encode(torch.randn(70, 64), "nf4:64")
    bias, addend = torch.randn(70) * 1e-3, torch.randn(2, 3, 70) * 1e-3
    x = torch.zeros(2, 3, 64, dtype=torch.bfloat16)
    assert torch.equal(ops.packed_linear(x, weight, bias=bias, addend=addend), (addend + bias).bfloat16())


def test_inputs_need_not_be_contiguous() -> None:
    weight = plain.encode(torch.randn(70, 64), "lm3:64")
    x = torch.randn(64, 10).T
    assert torch.equal(ops.packed_linear(x, weight), ops.packed_linear(x.contiguous(), weight))
    assert torch.equal(ops.packed_linear(x[::3], weight), ops.packed_linear(x[::3].contiguous(), weight))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(TAKEN), st.integers(1, 140), st.integers(1, 300), st.integers(1, 40), st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_size(spelling: str, rows: int, columns: int, count: int, dtype: torch.dtype, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = plain.encode(torch.randn(rows, columns, generator=random), spelling)
    x = torch.randn(count, columns, generator=random).to(dtype)
    assert_product(x, ops.packed_linear(x, weight), plain.decode(weight))


def test_scales_of_any_exponent() -> None:
    for factor in (1e-30, 1e25):
        weight = plain.encode(torch.randn(64, 64) * factor, "lm2:64")
        x = torch.randn(1, 64)
        found = ops.packed_linear(x, cpu_linear.arrange(weight)) / factor
        torch.testing.assert_close(
            found, x @ plain.decode(cpu_linear.canonical(replace(weight, arranged=True))).T / factor
        )


def test_what_is_not_multiplied_is_decoded_or_refused() -> None:
    for spelling in ("int8:64", "half:row", "lm2:8"):
        weight = plain.encode(torch.randn(20, 64), spelling)
        x = torch.randn(3, 64)
        torch.testing.assert_close(ops.packed_linear(x, weight), x @ plain.decode(weight).T)
        with pytest.raises(
            KernelError, match=f"no native kernel multiplies {spelling} weights with torch.float32 on cpu"
        ):
            ops.packed_linear(x, weight, invariant=True)
    with pytest.raises(KernelError, match=r"32 columns.*needs 64"):
        ops.packed_linear(torch.randn(2, 32), plain.encode(torch.randn(20, 64), "lm2:64"))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_product(isa: str) -> None:
    code = (
        "import torch; from bitloft.kernels import cpu_linear, ops, plain; torch.manual_seed(1)\n"
        "for fmt in ('lm2:64', 'nf4:64+dq', 'lm3:64', 'sign:128', 'uniform3:64', 'book2:64+shift'):\n"
        "    w = plain.encode(torch.randn(100, 320), fmt); dense = plain.decode(w).double()\n"
        "    for x in (torch.randn(1, 320), torch.randn(9, 320), torch.randn(5, 320).bfloat16()):\n"
        "        y = ops.packed_linear(x, w).double(); e = x.double() @ dense.T\n"
        "        assert (y - e).abs().max() < (2e-5 if x.dtype == torch.float32 else 1.2e-2) * e.abs().max(), fmt\n"
        "    a = cpu_linear.arrange(w)\n"
        "    assert torch.equal(ops.packed_linear(x, a).double(), y), fmt\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "BITLOFT_ISA": isa}
    )
    if "which this processor does not have" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert not done.returncode, done.stderr


@pytest.mark.skipif(not cpu_linear.takes_int8(), reason="no AVX-512 kernels here")
@pytest.mark.parametrize("spelling", TAKEN)
@pytest.mark.parametrize("shape", [(1, 1), (127, 576), (65, 130), (192, 128)])
def test_products_in_8_bits_are_those_of_the_definition(spelling: str, shape: tuple[int, int]) -> None:
    weight = plain.encode(torch.randn(shape), spelling)
    arranged = cpu_linear.can_arrange(weight.format, shape[1])
    bias = torch.randn(shape[0])
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 2, 4, 7, 33):
            x = (torch.randn(rows, shape[1]) * torch.rand(rows, 1)).to(dtype)
            exact = plain.rounded_linear(x, weight, "int8") + bias
            found = ops.packed_linear(x, weight, bias=bias, activations="int8")
            assert found.dtype == dtype
            scale = float(exact.abs().max())
            assert float((found.float() - exact).abs().max()) <= (1e-5 if dtype == torch.float32 else 5e-3) * scale
            for row in range(0, rows, 5):  # whatever stands beside it
                assert torch.equal(ops.packed_linear(x[row], weight, bias=bias, activations="int8"), found[row])
    if arranged:
        x = torch.randn(5, shape[1])
        before = ops.packed_linear(x, weight, activations="int8")
        assert torch.equal(ops.packed_linear(x, cpu_linear.arrange(weight), activations="int8"), before)


@pytest.mark.skipif(not cpu_linear.takes_int8(), reason="no AVX-512 kernels here")
def test_8_bits_of_zeros_and_of_what_is_no_number() -> None:
    weight = plain.encode(torch.randn(70, 64), "lm2:64")
    x = torch.zeros(3, 64)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    found = ops.packed_linear(x, weight, activations="int8")
    assert torch.equal(found[0], torch.zeros(70))
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()


@pytest.mark.parametrize("spelling", ["lm2:64", "nf4:64", "lm3:64", "int8:64"])
def test_input_rounded_to_bfloat16(spelling: str) -> None:
    weight = plain.encode(torch.randn(70, 128), spelling)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 128)
        exact = plain.rounded_linear(x, weight, "bf16")
        found = ops.packed_linear(x, weight, activations="bf16")
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 4e-3  # levels in bfloat16
        if rows == 3 and spelling == "lm2:64":
            assert not torch.equal(found, found.bfloat16().float())  # the result is not rounded


def test_activations_that_cannot_be_had() -> None:
    weight = plain.encode(torch.randn(20, 64), "int8:64")
    with pytest.raises(KernelError, match=r"8 bits of int8:64 weights with torch.float32 on cpu need native kernels"):
        ops.packed_linear(torch.randn(3, 64), weight, activations="int8")
    with pytest.raises(KernelError, match=r"activations are 'fp4'; use bf16 or int8"):
        ops.packed_linear(torch.randn(3, 64), weight, activations="fp4")
