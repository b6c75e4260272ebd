"""multi_lora: the native kernel, the definition and the registered operator agree; a row never sees its neighbours."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu, gpu, lora
from bitloft.kernels.lora import Block, Factor, Segment, Start, multi_lora, multi_lora_plain, values
from bitloft.kernels.plain import encode

# What adapters store (water-filling, LoRAQuant, rtn, truncate, shrink), and more that starts may be stored in.
PAIRS = [
    ("sign:row", "sign:unit"), ("lm2:row", "lm2:unit"), ("lm3:row", "lm3:unit"), ("lm4:row", "lm4:unit"),
    ("sign:row", "lm2:unit"), ("lm4:row", "lm3:unit"), ("uniform2:128", "uniform2:128"),
    ("uniform3:128", "uniform3:128"), ("uniform4:64", "uniform4:128"), ("sign:128", "sign:128"),
    ("int8:row", "int8:row"), ("half:row", "half:unit"), ("lm4:64", "lm4:64"), ("nf4:64+dq", "nf4:64"),
    ("uniform2:row", "uniform3:row"), ("trellis1:row", "trellis2:unit"), ("trellis2:row", "trellis1:unit"),
    ("trellis3:row", "trellis4:unit"), ("trellis4:row", "trellis3:unit"), ("trellis2:row", "lm2:unit"),
]  # fmt: skip
ODD = [
    ("lm3:8", "nf4:24"), ("uniform3:40", "sign:16"), ("book2:64", "book3:72"), ("lm2:64+shift", "uniform2:tensor"),
    ("int8:24", "int8:64"), ("lm2:row+shift", "nf3:32+dq"),
]  # fmt: skip
PLAIN = [torch.float32, torch.bfloat16, torch.float16]


def pair(formats: tuple[str, str], k: int, width: tuple[int, int], generator: torch.Generator) -> Block:
    a, bt = (torch.randn(k, n, generator=generator) for n in width)
    return encode(a * 0.1, formats[0]), encode(bt, formats[1])


def batch(
    kinds: list[list[tuple[str, str] | torch.dtype]], width: tuple[int, int], rows: int, rank: int = 3, seed: int = 0
) -> list[Segment]:
    """A segment for each list of kinds of blocks; the rows are dealt out in turn."""
    generator = torch.Generator().manual_seed(seed)
    segments = []
    for i, names in enumerate(kinds):
        blocks: list[Block] = []
        for name in names:
            k = int(torch.randint(1, rank + 1, (), generator=generator))
            if isinstance(name, torch.dtype):
                a, bt = (torch.randn(k, n, generator=generator).to(name) for n in width)
                blocks.append((a, bt))
            else:
                blocks.append(pair(name, k, width, generator))
        segments.append(Segment(tuple(range(i, rows, len(kinds) + 1)), tuple(blocks)))
    return segments


def assert_close(found: Tensor, expected: Tensor, of: Tensor | None = None) -> None:
    """Sums in another order: equal up to float32's noise of the largest, or of the largest in ``of``."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.numel():
        top = float((expected if of is None else of).abs().max())
        assert float((found - expected).abs().max()) <= 1e-5 * max(top, 1e-20)


def term_sizes(x: Tensor, segments: list[Segment], features: int, start: Start | None) -> Tensor:
    """The sizes of the terms of every output, added up."""

    def positive(blocks: Iterable[Block]) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple((values(a).abs(), values(bt).abs()) for a, bt in blocks)

    all_rows = () if start is None else positive([(start.a, start.bt)])
    own = [Segment(rows, positive(blocks)) for rows, blocks in segments]
    return multi_lora_plain(x.abs(), [Segment(tuple(range(len(x))), all_rows), *own], features)


needs_native = pytest.mark.skipif(cpu.library() is None, reason="the package was built without native kernels")


@needs_native
@pytest.mark.parametrize("formats", [*PAIRS, *ODD, *((d,) for d in PLAIN)], ids=str)
@pytest.mark.parametrize("width", [(576, 64), (1, 127), (127, 1), (130, 200)], ids=str)
def test_every_format_agrees_with_the_definition(
    formats: tuple[str, str] | tuple[torch.dtype], width: tuple[int, int]
) -> None:
    kind = formats[0] if isinstance(formats[0], torch.dtype) else formats
    segments = batch([[kind], [kind, kind]], width, rows=7)
    for x in (torch.randn(7, width[0]), torch.randn(7, 2, width[0]).bfloat16(), torch.randn(7, width[0]).half()):
        assert_close(multi_lora(x, segments, width[1]), multi_lora_plain(x, segments, width[1]))


kind_of_block = st.sampled_from([*PAIRS, *PLAIN])


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.lists(kind_of_block, max_size=3), max_size=4),
    width=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    rows=st.integers(0, 9),
    length=st.integers(0, 3),
    dtype=st.sampled_from(PLAIN),
    start=st.booleans(),
)
def test_any_mixture(
    kinds: list[list[tuple[str, str] | torch.dtype]], width: tuple[int, int], rows: int, length: int,
    dtype: torch.dtype, start: bool,
) -> None:  # fmt: skip
    segments = batch(kinds, width, rows)
    generator = torch.Generator().manual_seed(1)
    shape = (rows, length, width[0]) if length else (rows, width[0])
    x = torch.randn(shape, generator=generator).to(dtype)
    a0, b0 = pair(("lm4:64", "lm4:64"), 5, width, generator)
    first = Start(a0, b0, 0.5) if start else None  # type: ignore[arg-type]
    found, expected = (product(x, segments, width[1], first) for product in (multi_lora, multi_lora_plain))
    assert_close(found, expected, term_sizes(x, segments, width[1], first))  # a single output may nearly cancel


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_whatever_shares_its_batch(dtype: torch.dtype) -> None:
    width = (320, 200)
    blocks = [segment.blocks for segment in batch([[name] for name in PAIRS], width, 99, rank=5)]
    mine = tuple(itertools.chain(*blocks))
    row = torch.randn(1, width[0]).to(dtype)
    alone = multi_lora(row, [Segment((0,), mine)], width[1])
    for rows in range(1, 33):
        x = torch.randn(rows, width[0]).to(dtype)
        at = rows * 7 % rows if rows % 2 else rows - 1
        x[at] = row
        others = [i for i in range(rows) if i != at]
        for segments in (
            [Segment(tuple(range(rows)), mine)],
            [Segment((at,), mine), *(Segment((i,), blocks[i % len(blocks)]) for i in others)],
            [Segment(tuple(others[::2]), blocks[0]), Segment((at, *others[1::2]), mine)],
        ):
            assert torch.equal(multi_lora(x, segments, width[1])[at], alone[0])


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    segments = batch([[name] for name in PAIRS], (640, 512), 32, rank=16)
    x = torch.randn(32, 640)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(multi_lora(x, segments, 512))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_native
def test_a_nan_stays_in_its_row() -> None:
    segments = batch([[("lm2:row", "lm2:unit")]], (64, 64), 2)
    segments = [Segment((0, 1, 2), segments[0].blocks)]
    x = torch.randn(3, 64)
    clean = multi_lora(x, segments, 64)
    x[1, 5] = torch.nan
    found = multi_lora(x, segments, 64)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@needs_native
def test_codes_at_odd_addresses_and_the_end_of_a_payload() -> None:
    """Views into one buffer, as a packed adapter has them, with nothing behind the last byte."""
    whole = pair(("lm3:row", "lm3:unit"), 2, (72, 40), torch.Generator().manual_seed(0))
    payload = torch.empty(1 + sum(f.codes.numel() for f in whole if not isinstance(f, Tensor)), dtype=torch.int8)
    moved: list[Factor] = []
    at = 1
    for factor in whole:
        assert not isinstance(factor, Tensor)
        view = payload[at : at + factor.codes.numel()].view(factor.codes.shape)
        at += view.numel()
        parts = {**factor.tensors(), "codes": view.copy_(factor.codes)}
        moved.append(type(factor).from_tensors(factor.format, factor.shape, parts))
    x = torch.randn(1, 72)
    assert torch.equal(
        multi_lora(x, [Segment((0,), ((moved[0], moved[1]),))], 40), multi_lora(x, [Segment((0,), (whole,))], 40)
    )


def test_non_contiguous_inputs() -> None:
    segments = batch([[("lm2:row", "lm2:unit")]], (48, 32), 3)
    x = torch.randn(48, 3).T
    assert_close(multi_lora(x, segments, 32), multi_lora_plain(x, segments, 32))
    a, b = torch.randn(48, 2).T, torch.randn(32, 2).T
    segments = [Segment((0, 2), ((a, b),))]
    assert_close(multi_lora(x, segments, 32), multi_lora_plain(x, segments, 32))


@needs_native
def test_extreme_exponents() -> None:
    """Scales near both ends of float32, where a power of two on its own would leave it."""
    a, bt = torch.full((1, 64), 2.0**-120), torch.full((1, 64), 2.0**120)
    for formats in (("lm2:row", "lm2:row"), ("sign:64", "half:row")):
        segments = [Segment((0,), ((encode(a, formats[0]), encode(bt, formats[1])),))]
        x = torch.ones(1, 64)
        found = multi_lora(x, segments, 64)
        assert_close(found, multi_lora_plain(x, segments, 64))
        assert float(found.abs().max()) > 1


def test_refusals() -> None:
    segments = batch([[("lm2:row", "lm2:unit")]], (48, 32), 3)
    x = torch.randn(3, 48)
    with pytest.raises(KernelError, match=r"do not fit 48 -> 33 features"):
        multi_lora(x, segments, 33)
    with pytest.raises(KernelError, match=r"do not fit 40 -> 32 features"):
        multi_lora(x[:, :40], segments, 32)
    with pytest.raises(KernelError, match=r"rows \[0, 0\] of a batch of 3; list each row once"):
        multi_lora(x, [Segment((0, 0), segments[0].blocks)], 32)
    with pytest.raises(KernelError, match=r"rows \[3\] of a batch of 3"):
        multi_lora(x, [Segment((3,), segments[0].blocks)], 32)


def test_cuda_tensors_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand in for CUDA ones, and what would be launched is recorded; tests/test_gpu.py runs it."""
    calls: list[tuple[int, bool]] = []

    def record(x: Tensor, segments: list[Segment], features: int, start: Start | None) -> Tensor:
        calls.append((len(segments), start is not None))
        return torch.zeros(*x.shape[:-1], features, device=x.device)

    monkeypatch.setattr(gpu, "takes", lambda tensor: tensor.device.type == "meta")
    monkeypatch.setattr(gpu, "multi_lora", record)
    a, bt = (encode(torch.randn(2, width), "lm2:64") for width in (64, 8))
    there = [
        Segment((1,), ((a.to("meta"), bt.to("meta")), (torch.zeros(3, 64).to("meta"), torch.zeros(3, 8).to("meta"))))
    ]
    start = Start(a.to("meta"), bt.to("meta"), 0.5)
    x = torch.zeros(3, 64, device="meta")
    assert multi_lora(x, there, 8, start).shape == (3, 8)
    assert multi_lora(x.bfloat16(), there, 8).shape == (3, 8)
    assert calls == [(1, True), (1, False)]
    one_range = encode(torch.randn(2, 8), "uniform2:tensor").to("meta")
    assert not gpu.takes_lora(x, [a.to("meta"), one_range])  # the kernel reads scales by group
    assert not gpu.takes_lora(x.requires_grad_(), [a.to("meta"), bt.to("meta")])  # it knows no gradient
    assert not gpu.takes_lora(torch.zeros(1, 300, 64, device="meta"), [a.to("meta"), bt.to("meta")])  # a prompt
    assert not gpu.takes_lora(x.detach(), [a, bt])
    multi_lora(torch.randn(3, 64), [Segment((1,), ((a, bt),))], 8)  # the CPU's own are not sent there
    assert len(calls) == 2


def test_a_registered_operator() -> None:
    segments = batch([[PAIRS[6], PAIRS[0]], [torch.float32]], (130, 70), 4)
    generator = torch.Generator().manual_seed(1)
    a0, b0 = pair(("lm4:64", "lm4:64"), 5, (130, 70), generator)
    start = Start(a0, b0, 0.5)  # type: ignore[arg-type]
    parts, described = lora._flatten(segments, start)
    x = torch.randn(4, 3, 130)
    checked = torch.library.opcheck(torch.ops.bitloft.multi_lora.default, (x, parts, described, 70))
    assert set(checked.values()) == {"SUCCESS"}


PROGRAM = """
import torch
from tests.test_lora import ODD, PAIRS, PLAIN, assert_close, batch
from bitloft.kernels import cpu
from bitloft.kernels.lora import multi_lora, multi_lora_plain
assert cpu.isa() == {isa!r}, cpu.isa()
for width in ((200, 130), (64, 128)):
    for kind in [*PAIRS, *ODD, *PLAIN]:
        segments = batch([[kind], [kind, kind]], width, 11)
        for x in (torch.randn(11, width[0]), torch.randn(11, width[0]).bfloat16(), torch.randn(11, width[0]).half()):
            assert_close(multi_lora(x, segments, width[1]), multi_lora_plain(x, segments, width[1]))
"""


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    environment = {**os.environ, "BITLOFT_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(isa=isa)], env=environment, cwd=root, capture_output=True, text=True
    )
    if "does not have" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-2000:]
