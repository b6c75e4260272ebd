"""factors.py: both kinds of adapter give the delta that they stand for; what is written reads back the same."""

from pathlib import Path

import pytest
import torch

from bitloft.adapters import read_adapter
from bitloft.compress import compress, expand
from bitloft.errors import AdapterError
from bitloft.factors import Pair, read_factors, stacked, write_lora
from tests.helpers import make_adapter


def test_plain_pairs_have_the_scaling_folded_in(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a", rank=4, alpha=12))
    found = read_factors(tmp_path / "a")
    assert set(found.pairs) == {pair.name for pair in adapter.pairs}
    for pair in adapter.pairs:
        torch.testing.assert_close(found.pairs[pair.name].product(), 3.0 * pair.b @ pair.a)


def test_packed_pairs_are_what_expand_writes(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a")
    compress(tmp_path / "a", tmp_path / "packed", bits=2.5)
    expand(tmp_path / "packed", tmp_path / "plain")
    packed, plain = read_factors(tmp_path / "packed"), read_factors(tmp_path / "plain")
    assert set(packed.pairs) == set(plain.pairs)
    for name, pair in packed.pairs.items():
        torch.testing.assert_close(pair.product(), plain.pairs[name].product(), rtol=1e-5, atol=1e-8)


def test_written_pairs_read_back_whatever_their_ranks(tmp_path: Path) -> None:
    pairs = {
        "m.wide": Pair(torch.randn(6, 20), torch.randn(30, 6)),
        "m.thin": Pair(torch.randn(2, 40), torch.randn(4, 2)),  # no room for rank 6
        "m.low": Pair(torch.randn(1, 20), torch.randn(20, 1)),  # filled up with zeros
    }
    rank = write_lora(tmp_path / "out", pairs, base_name="some/model", config={"task_type": "CAUSAL_LM"})
    assert rank == 6
    back = read_factors(tmp_path / "out")
    assert back.config["base_model_name_or_path"] == "some/model"
    assert back.config["task_type"] == "CAUSAL_LM"
    assert {name: pair.rank for name, pair in back.pairs.items()} == {"m.wide": 6, "m.thin": 2, "m.low": 6}
    for name, pair in pairs.items():
        torch.testing.assert_close(back.pairs[name].product(), pair.product())


def test_stacked_products_add() -> None:
    first = Pair(torch.randn(3, 8), torch.randn(5, 3))
    second = Pair(torch.randn(2, 8), torch.randn(5, 2))
    both = stacked(first, second)
    assert both.rank == 5
    torch.testing.assert_close(both.product(), first.product() + second.product())


def test_nothing_and_nan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no module is left"):
        write_lora(tmp_path / "a", {}, base_name="m")
    broken = Pair(torch.full((1, 8), float("nan")), torch.ones(8, 1))
    with pytest.raises(AdapterError, match=r"the factors of m\.q hold NaN"):
        write_lora(tmp_path / "b", {"m.q": broken}, base_name="m")
