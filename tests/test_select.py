"""Selection: what is quantized and the reason for everything that is not."""

import pytest
from torch import nn

from bitloft.errors import OptionError
from bitloft.modules.select import select_linears


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 16)}) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)


def test_all_linears_but_the_head_with_a_reason_for_the_rest() -> None:
    found = select_linears(Toy(), heads=["head"])
    assert found.chosen == ("layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up")
    assert found.left == {
        "embed": "Embedding is kept in 16 bit",
        "norm": "LayerNorm is kept in 16 bit",
        "head": "output head is kept in 16 bit",
    }


def test_patterns_match_whole_paths_or_their_ends() -> None:
    assert select_linears(Toy(), target=["q"]).chosen == ("layers.0.q", "layers.1.q")
    found = select_linears(Toy(), skip=["layers.0.*", "head"])
    assert found.chosen == ("layers.1.q", "layers.1.up")
    assert found.left["layers.0.q"] == "matches skip"
    assert select_linears(Toy(), target=["*.up"], heads=["head"]).left["head"] == "output head is kept in 16 bit"


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="target pattern 'qq' matches none of the model's 5 linear modules"):
        select_linears(Toy(), target=["qq"])
    with pytest.raises(OptionError, match="skip pattern 'emb"):
        select_linears(Toy(), skip=["embed"])
    with pytest.raises(OptionError, match="no module is left"):
        select_linears(Toy(), skip=["*"])
