"""Selection: what is quantized, as what kind, and the reason for everything that is not."""

import pytest
import torch
from torch import nn

from bitloft.errors import OptionError
from bitloft.modules.select import Selection, select_modules, tied_modules
from bitloft.options import QuantizeOptions


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(8, 8), nn.Linear(8, 16)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(10, 8), nn.Embedding(6, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.pooler = nn.Linear(8, 8)


class Toy(nn.Module):
    """What transformers' models answer to, without transformers."""

    base_model_prefix = "model"

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.model = Base()
        self.classifier = nn.Linear(8, 3)
        self.head = nn.Linear(8, 10, bias=False)
        self.all_tied_weights_keys = {"head.weight": "model.embed.weight"} if tied else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def select(model: nn.Module | None = None, **settings: object) -> Selection:
    return select_modules(model or Toy(), QuantizeOptions(**settings))  # type: ignore[arg-type]


def test_all_linears_of_the_base_with_a_reason_for_the_rest() -> None:
    found = select()
    assert list(found.chosen) == ["model.layers.0.q", "model.layers.0.up", "model.layers.1.q", "model.layers.1.up"]
    assert set(found.chosen.values()) == {"linear"}
    assert found.left == {
        "model.embed": "Embedding is kept in 16 bit",
        "model.positions": "Embedding is kept in 16 bit",
        "model.norm": "LayerNorm is kept in 16 bit",
        "model.pooler": "task heads and poolers are kept in 16 bit",
        "classifier": "task heads and poolers are kept in 16 bit",
        "head": "output head is kept in 16 bit",
    }


def test_nothing_with_a_weight_is_missing() -> None:
    for settings in ({}, {"embeddings": True, "head": True}, {"target": ("q",)}, {"skip": ("layers.*",), "head": True}):
        model = Toy(tied=not settings.get("skip"))
        found = select(model, **settings)
        weighted = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
        assert found.chosen.keys() | found.left.keys() == weighted
        assert not found.chosen.keys() & found.left.keys()


def test_patterns_match_whole_paths_or_their_ends() -> None:
    assert list(select(target=("q",)).chosen) == ["model.layers.0.q", "model.layers.1.q"]
    found = select(skip=("layers.0.*", "head"))
    assert list(found.chosen) == ["model.layers.1.q", "model.layers.1.up"]
    assert found.left["model.layers.0.q"] == "matches skip"
    assert found.left["classifier"] == "task heads and poolers are kept in 16 bit"
    assert select(target=("*.up",)).left["model.layers.0.q"] == "does not match target"


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="target pattern 'qq' matches none of the 8 modules that can be quantized"):
        select(target=("qq",))
    with pytest.raises(OptionError, match="skip pattern 'emb'"):
        select(skip=("emb",))
    with pytest.raises(OptionError, match="no module is left to quantize"):
        select(skip=("*",))


def test_tables_and_heads_are_quantized_when_asked() -> None:
    assert select(embeddings=True, head=True).chosen["model.embed"] == "embedding"
    assert select(embeddings=True, head=True).left["head"] == "tied to model.embed, packed with it"
    apart = select(Toy(tied=False), head=True)
    assert apart.chosen["head"] == "linear"
    assert apart.left["model.embed"] == "Embedding is kept in 16 bit"
    narrowed = select(embeddings=True, head=True, target=("q",))
    assert list(narrowed.chosen) == ["model.embed", "model.layers.0.q", "model.layers.1.q"]
    assert select(embeddings=True, head=True, skip=("head",)).left["model.embed"] == "matches skip"


@pytest.mark.parametrize("settings", [{"embeddings": True}, {"head": True}])
def test_half_of_a_tied_matrix_is_refused(settings: dict[str, bool]) -> None:
    with pytest.raises(OptionError, match=r"model\.embed and the output head are one matrix in this model; ask"):
        select(**settings)  # type: ignore[arg-type]


def test_what_the_checkpoint_lacks_is_made_fresh_and_left() -> None:
    model = Toy()
    held = {n for n in model.state_dict() if n not in ("model.layers.1.q.weight", "model.embed.weight")}
    found = select_modules(model, QuantizeOptions(embeddings=True, head=True), held)
    assert found.left["model.layers.1.q"] == "not in the checkpoint: this model class makes it fresh"
    assert "model.embed" in found.chosen  # under its other name, head.weight


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_subclasses_with_a_forward_of_their_own_are_left() -> None:
    model = Toy(tied=False)
    model.model.embed = Scaled(10, 8)
    assert select(model, embeddings=True).left["model.embed"] == "Scaled is kept in 16 bit"
    tied = Toy()
    tied.head = nn.Bilinear(8, 8, 10)  # type: ignore[assignment]
    assert "cannot read a packed one" in select(tied, embeddings=True, head=True).left["model.embed"]


def test_routers_and_thin_matrices_are_left() -> None:
    model = Toy()
    block = nn.ModuleDict({"gate": nn.Linear(8, 16), "experts": nn.ModuleList(), "shared_expert_gate": nn.Linear(8, 1)})
    model.model.add_module("mlp", block)
    model.model.add_module("thin", nn.Linear(8, 4))
    left = select(model).left
    assert left["model.mlp.gate"] == left["model.mlp.shared_expert_gate"] == "routers are kept in 16 bit"
    assert left["model.thin"] == "4 x 8 is too thin: packing saves nothing"


class OtherExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 8))


def test_experts_of_an_unknown_form_are_left_with_that_reason() -> None:
    model = Toy()
    model.model.add_module("moe", OtherExperts())
    assert "do not follow transformers' experts interface" in select(model).left["model.moe"]


def test_ties_are_between_weights() -> None:
    assert tied_modules(Toy()) == {"head": "model.embed"}
    assert tied_modules(nn.Linear(2, 2)) == {}
