"""multi_lora's native side: sizes are checked again where they are used, and a description serves many steps."""

import pytest
import torch

from bitloft.errors import KernelError
from bitloft.kernels import cpu, cpu_lora
from bitloft.kernels.lora import Segment, multi_lora_plain
from bitloft.kernels.ops import encode

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the package was built without native kernels")


def blocks(k: int = 2, width: tuple[int, int] = (40, 24)) -> cpu_lora.Blocks:
    a, bt = encode(torch.randn(k, width[0]), "lm2:row"), encode(torch.randn(k, width[1]), "lm3:unit")
    return cpu_lora.Blocks([(a, bt)])


def test_one_description_serves_many_steps_and_lengths() -> None:
    a, b = torch.randn(3, 40), torch.randn(3, 24)
    rows = cpu_lora.Rows(3, [[2, 0]])
    job = cpu_lora.Job(24, rows, [cpu_lora.Blocks([(a, b)])])
    for shape in ((3, 40), (3, 5, 40), (3, 1, 40)):
        x = torch.randn(shape)
        out = torch.full((*shape[:-1], 24), torch.nan)
        cpu_lora.run(x, rows, [job.to(out, add=False)])
        expected = multi_lora_plain(x, [Segment((2, 0), ((a, b),))], 24)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        cpu_lora.run(x, rows, [job.to(out, add=True)])
        torch.testing.assert_close(out, 2 * expected, atol=1e-4, rtol=1e-4)


def test_several_matrices_share_an_input() -> None:
    rows, x = cpu_lora.Rows(2, [[0], [1]]), torch.randn(2, 40)
    mine = [blocks(width=(40, n)) for n in (24, 24, 64)]
    jobs = [
        cpu_lora.Job(24, rows, [mine[0], None]),
        cpu_lora.Job(24, rows, [None, mine[1]], shared=mine[0]),
        cpu_lora.Job(64, rows, [mine[2], mine[2]]),
    ]
    together = [torch.empty(2, n) for n in (24, 24, 64)]
    cpu_lora.run(x, rows, [job.to(out, add=False) for job, out in zip(jobs, together, strict=True)])
    for job, expected in zip(jobs, together, strict=True):
        alone = torch.empty_like(expected)
        cpu_lora.run(x, rows, [job.to(alone, add=False)])
        assert torch.equal(alone, expected)
    assert not together[0][1].any()
    torch.testing.assert_close(together[1][0], together[0][0])


def test_sums_are_rounded_once_to_the_output() -> None:
    rows, x = cpu_lora.Rows(1, [[0]]), torch.randn(1, 40)
    job = cpu_lora.Job(24, rows, [blocks()])
    exact = torch.zeros(1, 24)
    cpu_lora.run(x, rows, [job.to(exact, add=False)])
    for dtype in (torch.bfloat16, torch.float16):
        held = torch.randn(1, 24).to(dtype)
        expected = (held.float() + exact).to(dtype)
        cpu_lora.run(x, rows, [job.to(held, add=True)])
        torch.testing.assert_close(held, expected)


def test_what_c_refuses() -> None:
    x, out = torch.randn(2, 40), torch.empty(2, 24)

    def run(rows: cpu_lora.Rows, job: cpu_lora.Job) -> None:
        cpu_lora.run(x, rows, [job.to(out, add=False)])

    rows = cpu_lora.Rows(2, [[0]])
    with pytest.raises(KernelError, match="a factor has 2 x 32 values where 2 x 40 are needed"):
        run(rows, cpu_lora.Job(24, rows, [blocks(width=(32, 24))]))
    with pytest.raises(KernelError, match="a factor has 2 x 16 values where 2 x 24 are needed"):
        run(rows, cpu_lora.Job(24, rows, [], shared=blocks(width=(40, 16))))
    twice = cpu_lora.Rows(2, [[1], [1]])
    twice.struct.count = 2  # without the segment of all others
    with pytest.raises(KernelError, match="a segment lists row 1 of a batch of 2, or lists it twice"):
        run(twice, cpu_lora.Job(24, twice, [blocks()]))
    beyond = cpu_lora.Rows(2, [[5]])
    with pytest.raises(KernelError, match="segments list 3 rows of a batch of 2"):
        run(beyond, cpu_lora.Job(24, beyond, [blocks()]))
    a, bt = encode(torch.randn(2, 40), "lm2:row"), encode(torch.randn(2, 24), "lm2:row")
    job = cpu_lora.Job(24, rows, [cpu_lora.Blocks([(a, bt)])])
    job.struct.own[0].block[0].a.packed[0].codes_bytes -= 1
    with pytest.raises(KernelError, match="bytes of codes"):
        run(rows, job)
