"""The operators as everybody calls them: native or plain, the results are the definition's."""

from typing import Any

import pytest
import torch

from bitloft.kernels import cpu, cpu_dequantize, gpu, ops, plain


def test_every_name_is_public_and_there() -> None:
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


@pytest.mark.skipif(cpu.library() is None, reason="no native library was built")
@pytest.mark.parametrize("shape", [(70, 96), (130, 64), (1, 8)])
def test_many_rows_of_bfloat16_go_through_decoded_tiles(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(cpu_dequantize, "TILE", 32 * shape[1])
    weight = plain.encode(torch.randn(shape), "lm3:8")
    x = torch.randn(2, ops.MANY, shape[1]).bfloat16()
    bias, addend = torch.randn(shape[0]), torch.randn(2, ops.MANY, shape[0])
    dense = plain.decode(weight, torch.bfloat16).double()
    cases: tuple[dict[str, Any], ...] = ({}, {"bias": bias}, {"addend": addend}, {"bias": bias, "addend": addend})
    for given in cases:
        exact = x.double() @ dense.T + sum(t.double() for t in given.values())
        found = ops.packed_linear(x, weight, **given)
        assert found.dtype == x.dtype
        assert float((found.double() - exact).abs().max()) <= 1e-2 * float(exact.abs().max())
    # a small addend is not lost beside a large sum: it is rounded by itself, the sum once
    small = addend * 1e-3
    moved = ops.packed_linear(x, weight, addend=small).double() - x.double() @ dense.T
    if shape[0] > 1:
        assert float((moved * small).sum() / small.double().square().sum()) == pytest.approx(1, abs=0.2)
    grad = torch.randn(3, shape[0])
    torch.testing.assert_close(ops.packed_linear_grad_input(grad, weight), grad @ plain.decode(weight))
    assert ops.packed_linear_grad_input(grad[:0], weight).shape == (0, shape[1])


def test_cuda_tensors_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand in for CUDA ones, and what would be launched is recorded; tests/test_gpu.py runs it."""
    calls: list[str] = []

    def record(name: str) -> object:
        def call(x: torch.Tensor, *rest: object) -> torch.Tensor:
            calls.append(name)
            return torch.zeros(3, 8, device="meta")

        return call

    monkeypatch.setattr(gpu, "takes", lambda tensor: tensor.device.type == "meta")
    for name in ("decode", "packed_linear", "packed_linear_grad_input"):
        monkeypatch.setattr(gpu, name, record(name))
    weight = plain.encode(torch.randn(8, 64), "lm2:64").to("meta")
    x = torch.zeros(3, 64, device="meta")
    ops.decode(weight)
    assert ops.packed_linear(x, weight, bias=torch.zeros(8, device="meta")).shape == (3, 8)
    ops.packed_linear_grad_input(torch.zeros(3, 8, device="meta"), weight)
    assert calls == ["decode", "packed_linear", "packed_linear_grad_input"]
    ops.decode(plain.encode(torch.randn(8, 64), "lm2:64"))
    assert len(calls) == 3  # the CPU's own are not sent there
    assert ops.explain() == f"{cpu.explain()}; CUDA tensors: {gpu.explain()}"
