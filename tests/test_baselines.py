"""Baselines: what each stores, against their descriptions restated, and in the order that theory gives."""

import pytest
import torch
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.kernels.ops import decode
from bitloft.solvers.adapter import Components, Loose, PackedBlock, Trained, components, product_error
from bitloft.solvers.baselines import billm, gptq, pb_llm, rtn, shrunk, sign, truncated


def made(rank: int = 8, columns: int = 300, rows: int = 200, seed: int = 0) -> tuple[Trained, Components]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator) * torch.logspace(0, -0.7, rank)[:, None]
    b = torch.randn(rows, rank, generator=generator)
    b = b @ (torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=generator))
    return Trained(a, 2.0 * b.T.contiguous()), components(a, b, 2.0)


def lost(exact: Components, blocks: tuple[PackedBlock, ...] | Loose) -> float:
    return product_error(exact, (blocks,) if isinstance(blocks, Loose) else blocks) / exact.energy


def moment(columns: int, seed: int = 1) -> Tensor:
    """Inputs that live mostly in a quarter of the directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns // 4, generator=generator) @ torch.randn(columns // 4, columns)
    return x.T @ x / len(x) + 0.05 * torch.eye(columns)


def test_more_bits_lose_less() -> None:
    trained, exact = made()
    errors = [lost(exact, found) for found in (sign(trained), rtn(trained, 3), rtn(trained, 4))]
    assert errors[0] > errors[1] > errors[2]
    assert 0.4 < errors[0] < 0.7
    assert [str(f[0].a.format) for f in (sign(trained), rtn(trained, 2))] == ["sign:128", "uniform2:128"]


def test_gptq_loses_less_than_rounding_where_components_or_inputs_correlate() -> None:
    trained, exact = made()
    assert lost(exact, gptq(trained, 3)) < lost(exact, rtn(trained, 3))
    s = moment(300)
    root = torch.linalg.cholesky(s)
    weighed = components(trained.a, trained.bt.T.contiguous(), 1.0, root)
    assert lost(weighed, gptq(trained, 3, s)) < 0.8 * lost(weighed, rtn(trained, 3))
    assert lost(weighed, gptq(trained, 3, s)) < lost(weighed, gptq(trained, 3))


def test_gptq_of_orthogonal_components_is_rounding() -> None:
    a = torch.eye(4, 128)
    trained = Trained(a, torch.randn(4, 256))
    for found, plain in zip(gptq(trained, 4), rtn(trained, 4), strict=True):
        assert torch.equal(decode(found.bt), decode(plain.bt))


@pytest.mark.parametrize("width", [8, 16])
def test_truncation_keeps_what_its_rank_keeps(width: int) -> None:
    trained, exact = made()
    for rank in (1, 3, 8):
        expected = float(exact.s[rank:].square().sum()) / exact.energy
        assert lost(exact, truncated(exact, trained, rank=rank, width=width)) == pytest.approx(expected, abs=1e-3)
        by_norm = lost(exact, truncated(exact, trained, rank=rank, width=width, by="norm"))
        assert by_norm >= expected - 1e-3  # Eckart-Young
    (block,) = truncated(exact, trained, rank=2, width=width)
    assert block.a.nbytes == 2 * (304 * width // 8 + 2) + 4
    with pytest.raises(OptionError, match="cannot truncate to rank 0"):
        truncated(exact, trained, rank=0, width=16)


def test_the_shrunk_control_is_as_far_as_it_was_asked_to_be() -> None:
    _, exact = made()
    assert lost(exact, shrunk(exact, 0.2)) == pytest.approx(0.2, abs=1e-3)
    with pytest.raises(OptionError, match=r"error to shrink by is 1\.5"):
        shrunk(exact, 1.5)


def test_masks_are_counted() -> None:
    trained, exact = made(rank=10, columns=256, rows=128)
    values = 10 * 384
    pb, bi = pb_llm(trained), billm(trained)
    assert 8 * pb.nbytes / values == pytest.approx(1 + 0.1 * 8 + 0.9 + 40 / 128, abs=0.02)
    assert 8 * bi.nbytes / values == pytest.approx(2 + 32 / 128, abs=0.01)
    assert lost(exact, bi) < lost(exact, sign(trained))
    assert lost(exact, pb) < lost(exact, sign(trained))


def test_zero_factors_stay_zero() -> None:
    trained = Trained(torch.zeros(2, 40), torch.zeros(2, 24))
    exact = components(trained.a, trained.bt.T, 1.0)
    for found in (rtn(trained, 2), sign(trained), gptq(trained, 2), truncated(exact, trained, rank=1, width=16)):
        assert not bool((decode(found[0].bt).T @ decode(found[0].a)).any())
