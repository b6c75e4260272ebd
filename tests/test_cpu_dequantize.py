"""Native dequantize, rows by number and the residual: bit-equal to the definition, in every dtype."""

import pytest
import torch

from bitloft.errors import KernelError
from bitloft.kernels import cpu, cpu_dequantize, ops, plain
from bitloft.packed import PackedTensor
from tests.test_cpu_encode import FORMATS

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no native library")

SHAPES = ((64, 256), (5, 576), (3, 1), (17, 127), (1, 1000), (2, 3, 65), (130,), (0, 8), (4, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", [*FORMATS, "sign:8", "half:row", "half:unit"])
def test_values_are_those_of_the_definition(spelling: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        packed = plain.encode(torch.randn(shape), spelling)
        exact, found = plain.decode(packed, dtype), cpu_dequantize.decode(packed, dtype)
        assert found.shape == exact.shape
        assert torch.equal(found, exact)
        if len(shape) == 2 and shape[0]:
            rows = torch.randint(0, shape[0], (7,))
            assert torch.equal(cpu_dequantize.decode_rows(packed, rows, dtype), exact[rows])


def test_tiny_and_huge_scales() -> None:
    for factor in (1e-37, 1e-20, 1e20):
        packed = plain.encode(torch.randn(6, 100) * factor, "lm3:64+dq")
        assert torch.equal(ops.decode(packed), plain.decode(packed))


def test_rows_by_number() -> None:
    packed = ops.encode(torch.randn(10, 70), "nf4:64")
    assert ops.decode_rows(packed, torch.zeros(0, dtype=torch.int64)).shape == (0, 70)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(ops.decode_rows(packed, torch.tensor([3, 3, 0], dtype=dtype)), ops.decode(packed)[[3, 3, 0]])
    for wrong in (-1, 10, 1 << 40):
        with pytest.raises(IndexError):
            ops.decode_rows(packed, torch.tensor([0, wrong]))
    with pytest.raises(KernelError, match="decode_rows takes a matrix"):
        ops.decode_rows(ops.encode(torch.randn(2, 3, 8), "nf4:8"), torch.tensor([0]))


@pytest.mark.parametrize("spelling", ["lm2:64", "nf3:8", "sign:row", "int8:row", "uniform3:64", "half:unit", "lm4:40"])
@pytest.mark.parametrize("shape", [(7, 200), (3, 1), (2, 3, 33), (0, 8)])
def test_the_residual_and_its_norm(spelling: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    packed = ops.encode(x + 0.1, spelling)
    out = torch.empty_like(x)
    size = ops.residual(x, packed, out=out)
    exact = x - plain.decode(packed)
    assert torch.equal(out, exact)
    assert size == pytest.approx(float(exact.double().norm()), rel=1e-6)
    assert ops.residual(x, packed) == size
    assert plain.residual(x, packed, None) == pytest.approx(size, rel=1e-6)
    ops.residual(x, packed, out=x)  # in place
    assert torch.equal(x, exact)


def test_the_residual_of_other_strides_and_dtypes_is_the_definition() -> None:
    x = torch.randn(40, 30).T
    packed = ops.encode(x, "lm2:64")
    assert ops.residual(x, packed) == pytest.approx(float((x - ops.decode(packed)).norm()), rel=1e-5)
    with pytest.raises(KernelError, match=r"the residual of a tensor of shape \(40, 30\) and one packed as \(30, 40\)"):
        ops.residual(x.T, packed)


def test_the_residual_does_not_depend_on_threads() -> None:
    x, before = torch.randn(500, 300), torch.get_num_threads()
    packed = ops.encode(x, "nf2:64")
    try:
        torch.set_num_threads(1)
        one = ops.residual(x, packed)
        torch.set_num_threads(3)
        assert ops.residual(x, packed) == one
    finally:
        torch.set_num_threads(before)


def test_sizes_are_checked_in_c() -> None:
    packed = ops.encode(torch.randn(4, 64), "lm2:64")
    out = torch.empty(4, 64)
    call = cpu_dequantize._function()

    def refused(matrix: cpu.Matrix, count: int = 4, dtype: int = 0) -> str:
        with pytest.raises(KernelError) as error:
            cpu.done(call(matrix, None, count, out.data_ptr(), out.nbytes, dtype, 1))
        return str(error.value)

    assert "no dtype 7" in refused(cpu.matrix(packed), dtype=7)
    assert "dequantize of 3 rows" in refused(cpu.matrix(packed), count=3)
    for field, value, words in (
        ("width", 60, "has width 60"), ("bits", 5, "codes of 5 bits"), ("scales_bytes", 1, "1 bytes of them"),
        ("rows", -1, "-1 rows"), ("flags", 8, "order of the file"), ("flags", 2, "bytes of"),
    ):  # fmt: skip
        matrix = cpu.matrix(packed)
        setattr(matrix, field, value)
        assert words in refused(matrix)


def test_other_dtypes_are_left_to_the_definition() -> None:
    packed: PackedTensor = ops.encode(torch.randn(4, 64), "lm2:64")
    assert not cpu_dequantize.takes(packed, torch.float64)
    assert ops.decode(packed, torch.float64).dtype == torch.float64
