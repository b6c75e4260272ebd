"""The Triton kernels against the plain definitions, in Triton's interpreter where there is no GPU (see conftest)."""

import importlib.util

import pytest
import torch
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import columnwise, gpu, plain
from bitloft.kernels.lora import Segment, Start, multi_lora_plain
from bitloft.packed import PackedTensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FORMATS = (
    "nf4:64", "nf3:64", "nf2:64", "lm4:32", "lm3:64", "lm2:64", "uniform4:64", "uniform3:64", "uniform2:64",
    "uniform2:tensor", "book2:64", "book3:64", "sign:128", "int8:row", "half:unit", "half:row", "lm2:row", "nf2:unit",
    "trellis1:row", "trellis2:unit", "trellis3:row", "trellis4:row", "lm2:64+dq", "nf4:64+dq", "lm3:64+shift",
    "uniform4:64+shift", "lm2:64+dq+shift",
)  # fmt: skip
SHAPES = ((33, 127), (64, 192), (5, 1), (1, 64))


def packed(fmt: str, rows: int, columns: int, scale: float = 0.05) -> PackedTensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * scale
    return plain.encode(values, fmt).to(DEVICE)


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[found.dtype]
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    if wanted.numel():
        assert float((found.float() - wanted.float()).abs().amax()) <= tolerance * float(wanted.float().abs().amax())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_the_definition(fmt: str, shape: tuple[int, int]) -> None:
    weight = packed(fmt, *shape)
    found, wanted = gpu.decode(weight), plain.decode(weight)
    if DEVICE == "cpu":
        assert torch.equal(found, wanted)
    else:  # a fused multiply-add may round once where the definition rounds twice
        close(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_decoded_by_their_levels(shape: tuple[int, int]) -> None:
    weight = packed("trellis2:64", *shape)
    close(columnwise.decode(weight, torch.float32, gpu.decode), plain.decode(weight))


def test_decode_rounds_once() -> None:
    weight = packed("lm3:64+shift", 20, 100)
    assert torch.equal(gpu.decode(weight, torch.float16), plain.decode(weight).half())
    if DEVICE == "cuda":  # the interpreter cuts bfloat16 instead of rounding
        assert torch.equal(gpu.decode(weight, torch.bfloat16), plain.decode(weight).bfloat16())
    close(gpu.decode(weight, torch.bfloat16), plain.decode(weight).bfloat16())


def test_decode_keeps_leading_axes_and_empty_tensors() -> None:
    stack = plain.encode(torch.randn(2, 3, 64), "lm2:64").to(DEVICE)
    assert torch.equal(gpu.decode(stack), plain.decode(stack))
    assert gpu.decode(plain.encode(torch.zeros(0, 64), "nf4:64").to(DEVICE)).shape == (0, 64)


@pytest.mark.parametrize("scale", [1e-36, 1e30])
def test_scales_near_the_ends_of_float32(scale: float) -> None:
    weight = packed("lm4:64", 4, 64, scale)
    assert torch.equal(gpu.decode(weight), plain.decode(weight))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_products_are_the_definition(fmt: str, count: int) -> None:
    weight = packed(fmt, 40, 136)
    x, grad = torch.randn(count, 136, device=DEVICE), torch.randn(count, 40, device=DEVICE)
    close(gpu.packed_linear(x, weight), plain.packed_linear(x, weight))
    close(gpu.packed_linear_grad_input(grad, weight), plain.packed_linear_grad_input(grad, weight))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 5, 37])
def test_odd_sizes(shape: tuple[int, int], count: int) -> None:
    weight = packed("lm2:64", *shape)
    x = torch.randn(count, shape[1] + 1, device=DEVICE)[:, 1:]  # not contiguous
    close(gpu.packed_linear(x, weight), plain.packed_linear(x, weight))
    grad = torch.randn(2, count, shape[0], device=DEVICE)
    close(gpu.packed_linear_grad_input(grad, weight), plain.packed_linear_grad_input(grad, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 8])
def test_half_precision_input(dtype: torch.dtype, count: int) -> None:
    weight = packed("nf4:64", 48, 192)
    x = torch.randn(count, 192, device=DEVICE).to(dtype)
    close(gpu.packed_linear(x, weight), (x.float() @ plain.decode(weight).T).to(dtype))


def test_a_row_does_not_depend_on_its_neighbours_where_rows_are_few() -> None:
    weight, x = packed("lm2:64", 48, 192), torch.randn(4, 192, device=DEVICE)
    together = gpu.packed_linear(x, weight)
    assert torch.equal(together, torch.cat([gpu.packed_linear(row[None], weight) for row in x]))


BLOCKS = ("lm2:64", "lm3:row", "sign:unit", "half:unit", "uniform4:64", "int8:row", "lm4:64+dq", "lm2:64+shift",
          "trellis3:row", "trellis2:unit", "")  # fmt: skip


def factor(fmt: str, rows: int, columns: int) -> PackedTensor | Tensor:
    return packed(fmt, rows, columns, 1.0) if fmt else torch.randn(rows, columns, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [(), (3,)])
def test_multi_lora_is_the_definition(dtype: torch.dtype, length: tuple[int, ...]) -> None:
    """Segments of different formats and ranks, several blocks each; a start; rows of nobody; tokens of a sequence."""
    columns, features = 100, 72
    many = Segment((4, 1), tuple((factor(f, 3, columns), factor(f, 3, features)) for f in BLOCKS))
    wide = Segment((0,), ((factor("lm2:64", 20, columns), factor("lm4:row", 20, features)),))
    start = Start(packed("lm4:64", 16, columns), packed("lm4:64", 16, features), 0.5)
    x = torch.randn(5, *length, columns, device=DEVICE).to(dtype)
    for segments in ([many, wide], [wide], []):
        for shared in (start, None):
            found = gpu.multi_lora(x, segments, features, shared)
            close(found, multi_lora_plain(x, segments, features, shared))


def test_multi_lora_of_no_rows() -> None:
    assert gpu.multi_lora(torch.zeros(0, 64, device=DEVICE), [], 8).shape == (0, 8)


def test_wrong_widths_are_refused() -> None:
    weight = packed("lm2:64", 8, 64)
    with pytest.raises(KernelError, match="the input has 63 columns"):
        gpu.packed_linear(torch.randn(1, 63, device=DEVICE), weight)
    with pytest.raises(KernelError, match="needs 8"):
        gpu.packed_linear_grad_input(torch.randn(1, 64, device=DEVICE), weight)
    with pytest.raises(KernelError, match="takes a matrix"):
        gpu.packed_linear(torch.randn(1, 64, device=DEVICE), plain.encode(torch.randn(2, 2, 64), "lm2:64").to(DEVICE))


def test_what_runs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.reason.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.explain() == "Triton (interpreted)"
    gpu.reason.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.explain() == "plain torch definition (triton is not installed)"
    assert not gpu.takes(torch.zeros(1))
    gpu.reason.cache_clear()
