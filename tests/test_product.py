"""The product of a packed layer: gradients, autocast, the start in float32, and the operator under torch.compile."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from bitloft.kernels.lora import Start
from bitloft.kernels.ops import decode, encode
from bitloft.kernels.product import packed_product


def weight_and_start() -> tuple[Any, Start]:
    weight = encode(torch.randn(70, 192), "lm2:64")
    return weight, Start(encode(torch.randn(4, 192), "lm4:64"), encode(torch.randn(4, 70), "lm4:64"), 0.5)


def dense_of(weight: Any, start: Start) -> torch.Tensor:
    return decode(weight) + start.scaling * decode(start.bt).T @ decode(start.a)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_forward_is_the_dense_product(rows: int) -> None:
    weight, start = weight_and_start()
    bias, addend = torch.randn(70), torch.randn(rows, 70)
    x = torch.randn(rows, 192)
    expected = x @ dense_of(weight, start).T + bias + addend
    found = packed_product(x, weight, start, bias=bias, addend=addend.clone())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    half = packed_product(x.bfloat16(), weight, start, bias=bias, addend=addend.clone())
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=0.3)


def test_gradients_of_input_bias_and_addend() -> None:
    weight, start = weight_and_start()
    bias = torch.randn(70, requires_grad=True)
    addend = torch.randn(2, 3, 70, requires_grad=True)
    x = torch.randn(2, 3, 192, requires_grad=True)
    seed = torch.randn(2, 3, 70)
    found = torch.autograd.grad(packed_product(x, weight, start, bias=bias, addend=addend), (x, bias, addend), seed)
    dense = dense_of(weight, start)
    expected = torch.autograd.grad(x @ dense.T + bias + addend, (x, bias, addend), seed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_small_start_survives_bfloat16() -> None:
    """Product 1 and start 1/512: bfloat16 has no 1 + 1/512, but their sum with a bias of 1/512 is 1 + 1/256."""
    weight = encode(torch.zeros(64, 64), "lm4:64")
    a, bt = torch.zeros(1, 64), torch.full((1, 64), 2.0**-9)
    a[0, 0] = 1
    start = Start(encode(a, "half:unit"), encode(bt, "half:unit"), 1.0)
    x = torch.zeros(1, 64)
    x[0, 0] = 1
    addend = torch.ones(1, 64)
    found = packed_product(x.bfloat16(), weight, start, bias=torch.full((64,), 2.0**-8), addend=addend)
    assert float(found[0, 0]) == 1 + 2.0**-7  # 1 + 3/512 rounds up; each part rounded on its own would leave 1
    assert float((torch.ones(1).bfloat16() + 2.0**-9).item()) != float(found[0, 0])


def test_autocast_decides_the_dtype() -> None:
    weight, start = weight_and_start()
    x = torch.randn(3, 192, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_product(x, weight, start)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense_of(weight, start).sum(0).expand(3, -1), rtol=0.05, atol=0.5)


COMPILED = """
import torch
from bitloft.kernels import cpu, cpu_linear
from bitloft.kernels.lora import Start
from bitloft.kernels.ops import encode
from bitloft.kernels.product import packed_product

weight = encode(torch.randn(64, 192), "lm2:64")
start = Start(encode(torch.randn(4, 192), "lm4:64"), encode(torch.randn(4, 64), "lm4:64"), 0.5)
bias = torch.randn(64, requires_grad=True)
x = torch.randn(3, 192, requires_grad=True)

def check(packed, start):
    step = lambda x, bias: packed_product(x, packed, start, bias=bias).square().sum()
    expected = step(x, bias)
    gradients = torch.autograd.grad(expected, (x, bias))
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(x, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for one, other in zip(torch.autograd.grad(found, (x, bias)), gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)

check(weight, start)
check(weight, None)
if cpu.library() is not None:
    check(cpu_linear.arrange(weight), None)
"""


def test_compiled_it_is_the_same() -> None:
    """In a process of its own: the checks of annotations that run under pytest cannot be traced."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert not done.returncode, done.stderr
