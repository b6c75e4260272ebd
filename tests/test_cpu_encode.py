"""The native encoder gives the definition's bytes: every family, odd sizes, every instruction set, any thread count."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import TENSOR, Format
from bitloft.kernels import cpu, cpu_encode, encoding, ops
from bitloft.packed import PackedTensor

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no native library")

FORMATS = ("nf4:64", "nf3:64", "nf2:8", "nf4:unit", "lm2:64", "lm3:64", "lm4:64", "lm2:row", "lm3:row",
           "lm4:40", "lm2:unit", "lm3:unit", "sign:128", "sign:row", "sign:unit", "int8:row", "int8:64",
           "uniform2:64", "uniform3:8", "uniform4:row", "uniform2:tensor", "book2:64", "book3:row",
           "nf4:64+dq", "nf3:64+dq+shift", "lm2:64+dq", "lm4:64+dq+shift", "uniform3:64+dq",
           "uniform4:64+dq+shift", "uniform2:64+shift", "sign:64+shift", "int8:64+dq+shift",
           "book2:32+shift", "book3:64+dq")  # fmt: skip
SHAPES = ((5, 576), (3, 1), (17, 127), (1, 1000), (120, 72), (2, 3, 65), (130,), (0, 64), (4, 0))


def tensors(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Gaussian, heavy-tailed, full of ties and signed zeros, and nothing but zeros."""
    made = torch.randn(shape)
    yield made
    yield torch.distributions.StudentT(3.0).sample(shape) * 0.02 + 0.01
    tied = (made * 2).round() / 2
    tied[..., ::3] *= -0.0
    yield tied
    yield torch.zeros(shape) - 0.0


def assert_same(a: PackedTensor, b: PackedTensor) -> None:
    assert (a.format, a.shape) == (b.format, b.shape)
    for name, part in a.tensors().items():
        assert torch.equal(part, b.tensors()[name]), f"{name} of {a.format} {a.shape}"


@pytest.mark.parametrize("spelling", FORMATS)
def test_bytes_are_those_of_the_definition(spelling: str) -> None:
    fmt = Format.parse(spelling)
    for shape in SHAPES:
        for x in tensors(shape):
            assert_same(cpu_encode.encode(x, fmt, False), encoding.encode(x, fmt))


@pytest.mark.parametrize("spelling", ["uniform2:64", "uniform3:row", "uniform4:8", "uniform3:64+dq"])
def test_a_searched_range_too(spelling: str) -> None:
    fmt = Format.parse(spelling)
    for shape in SHAPES:
        for x in tensors(shape):
            assert_same(cpu_encode.encode(x, fmt, True), encoding.encode(x, fmt, ranges=True))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 300), st.integers(0, 1 << 30), st.integers(-30, 30))
def test_any_size_and_magnitude(spelling: str, rows: int, columns: int, seed: int, power: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    fmt = Format.parse(spelling)
    assert_same(cpu_encode.encode(x, fmt, False), encoding.encode(x, fmt))


def test_other_dtypes_and_strides() -> None:
    x = torch.randn(96, 80)
    for made in (x.T, x[::2, 3:70], x.bfloat16(), x.half(), x.double(), x.clone().requires_grad_()):
        assert_same(ops.encode(made, "lm3:64"), encoding.encode(made.detach(), "lm3:64"))


@pytest.mark.parametrize("spelling", ["lm2:64", "nf4:64", "uniform4:64", "book2:64", "uniform2:tensor", "int8:row"])
def test_nan_and_infinity_are_refused(spelling: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(70, 100)
        x[69, 99] = value
        with pytest.raises(
            KernelError, match=rf"cannot encode a tensor of shape \(70, 100\) to {spelling}: it holds NaN"
        ):
            ops.encode(x, spelling)


def test_bytes_do_not_depend_on_threads() -> None:
    x, before = torch.randn(300, 1000), torch.get_num_threads()
    try:
        for spelling in ("lm2:64", "lm4:64+dq+shift", "nf4:64", "sign:row"):
            torch.set_num_threads(1)
            one = ops.encode(x, spelling)
            torch.set_num_threads(3)
            assert_same(ops.encode(x, spelling), one)
    finally:
        torch.set_num_threads(before)


DIGEST = """
import hashlib, torch
from bitloft.formats import Format
from bitloft.kernels import cpu, cpu_encode, cpu_dequantize
print(cpu.isa())
generator = torch.Generator().manual_seed(5)
for spelling in {formats!r}:
    for shape in ((40, 200), (3, 127)):
        packed = cpu_encode.encode(torch.randn(shape, generator=generator), Format.parse(spelling), False)
        values = cpu_dequantize.decode(packed, torch.float32)
        parts = [*packed.tensors().values(), values]
        print(spelling, hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest())
"""


def test_bytes_do_not_depend_on_the_instruction_set() -> None:
    found = {}
    for isa in ("portable", "avx2", "avx512"):
        script = DIGEST.format(formats=FORMATS)
        run = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"BITLOFT_ISA": isa}, capture_output=True, text=True
        )
        if run.returncode:
            assert "which this processor does not have" in run.stderr or "does not know" in run.stderr
            continue
        used, *digests = run.stdout.splitlines()
        assert used.startswith(isa)
        assert len(digests) == 2 * len(FORMATS)
        found[isa] = digests
    assert "portable" in found
    for isa, digests in found.items():
        assert digests == found["portable"], isa


def test_what_the_library_refuses() -> None:
    packed = encoding.encode(torch.randn(4, 64), "lm2:64")
    matrix = cpu.matrix(packed)
    call = cpu_encode._function()
    x = torch.randn(4, 64)

    def refused(rule: int, values: int = 256, given: object = None) -> str:
        with pytest.raises(KernelError) as error:
            cpu.done(call(x.data_ptr(), values, matrix, rule, given, 1))
        return str(error.value)

    assert "no rule 9 for scales" in refused(9)
    assert "255 values for 4 x 64" in refused(3, values=255)
    assert "rule 0 for scales, of which 1 are stored" in refused(0)
    assert "one range for a tensor" in refused(5, given=(ctypes.c_float * 2)(1.0, 0.0))
    matrix.codes_bytes = 63
    assert "63 bytes of codes" in refused(3)


def test_every_format_is_taken_but_half_and_foreign_devices() -> None:
    x = torch.randn(4, 64)
    assert all(cpu_encode.takes(x, Format.parse(spelling)) for spelling in FORMATS)
    assert not cpu_encode.takes(x, Format.parse("half:row"))
    assert not cpu_encode.takes(x.to("meta"), Format.parse("lm2:64"))
    assert Format.parse("uniform2:tensor").group == TENSOR
