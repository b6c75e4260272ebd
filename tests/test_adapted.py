"""modules/adapted.py: the right layer, or a sentence."""

import pytest
import torch
from torch import nn

from bitloft.errors import AdapterError
from bitloft.factors import Pair
from bitloft.formats import Format
from bitloft.modules.adapted import linear_of
from bitloft.modules.linear import QuantLinear


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 16)
        self.packed = QuantLinear(8, 16, Format.parse("lm2:8"))
        self.norm = nn.LayerNorm(8)
        self.table = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16)
        self.head.weight = self.table.weight


PAIR = Pair(torch.ones(1, 8), torch.ones(16, 1))


def test_plain_and_packed_linears_are_found() -> None:
    model = Model()
    assert linear_of(model, "plain", PAIR, "a") is model.plain
    assert linear_of(model, "packed", PAIR, "a") is model.packed


@pytest.mark.parametrize(
    ("name", "pair", "words"),
    [
        ("gone", PAIR, "adapter a adapts gone, which the base does not have"),
        ("norm", PAIR, "which is a LayerNorm; only linears can be"),
        ("table", PAIR, "which is a Embedding; only linears can be"),
        ("plain", Pair(torch.ones(1, 9), torch.ones(16, 1)), r"as \(16, 9\); in this base it is \(16, 8\)"),
        ("head", PAIR, "head shares its weight with another module"),
    ],
)
def test_others_are_refused(name: str, pair: Pair, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        linear_of(Model(), name, pair, "a")
