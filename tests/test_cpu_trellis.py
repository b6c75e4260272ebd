"""The native trellis encoder against its definition: the same bytes on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

from bitloft.errors import KernelError
from bitloft.formats import Format
from bitloft.kernels import cpu, cpu_trellis, ops, plain, trellis

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no native library was built")

SHAPES = [(3, 8), (2, 13), (4, 64), (2, 100), (3, 328), (0, 16), (2, 0)]


def rows_of(shape: tuple[int, int]) -> torch.Tensor:
    """Normal rows, heavy-tailed ones and one of zeros."""
    torch.manual_seed(shape[1])
    return torch.cat([torch.randn(shape), torch.randn(shape) ** 3, torch.zeros(shape[0] and 1, shape[1])])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", ["row", "unit"])
def test_bytes_are_the_definitions(shape: tuple[int, int], bits: int, group: str) -> None:
    x, fmt = rows_of(shape), Format.parse(f"trellis{bits}:{group}")
    for weights in (None, torch.rand(shape[1])):
        expected, found = trellis.encode(x, fmt, weights), cpu_trellis.encode(x, fmt, weights)
        for name, part in expected.tensors().items():
            assert torch.equal(part, found.tensors()[name]), name
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(plain.decode(found, dtype), ops.decode(found, dtype))
        if len(x):
            index = torch.tensor([len(x) - 1, 0])
            assert torch.equal(plain.decode_rows(found, index), ops.decode_rows(found, index))


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_every_instruction_set_gives_the_same_bytes(isa: str) -> None:
    code = (
        "import torch, hashlib; from bitloft.kernels import ops; torch.manual_seed(0); x = torch.randn(3, 120) ** 3\n"
        "for k in (1, 2, 3, 4):\n"
        "    p = ops.encode(x, f'trellis{k}:row')\n"
        "    made = p.codes.numpy().tobytes() + p.scales.numpy().tobytes() + ops.decode(p).numpy().tobytes()\n"
        "    print(hashlib.sha256(made).hexdigest())"
    )

    def said(name: str) -> str:
        environment = {**os.environ, "BITLOFT_ISA": name}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        if "does not have" in done.stderr or "does not know" in done.stderr:
            pytest.skip(f"this machine has no {name}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said(isa) == said(cpu.isa() or "")


def test_threads_change_nothing() -> None:
    x, before = torch.randn(9, 200), torch.get_num_threads()
    try:
        made = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(cpu_trellis.encode(x, Format.parse("trellis2:row")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0].codes, made[1].codes)
    assert torch.equal(made[0].scales, made[1].scales)


def test_what_cannot_be_coded_is_refused() -> None:
    fmt = Format.parse("trellis2:row")
    with pytest.raises(KernelError, match="it holds NaN or infinity"):
        cpu_trellis.encode(torch.tensor([[1.0, float("inf")]]), fmt)
    with pytest.raises(KernelError, match=r"\(3,\) weights do not fit rows of 4 values"):
        cpu_trellis.encode(torch.ones(1, 4), fmt, torch.ones(3))


def test_products_decode_first() -> None:
    x, packed = torch.randn(2, 64), ops.encode(torch.randn(5, 64), "trellis2:row")
    torch.testing.assert_close(ops.packed_linear(x, packed), x @ ops.decode(packed).T)
