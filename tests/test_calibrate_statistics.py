"""Second moments: shared inputs once, padding not at all, experts each their own; files that are whole or absent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitloft.calibrate.statistics import Gatherer, Saved, read_moments
from bitloft.errors import CheckpointError
from bitloft.solvers import Statistics
from tests.architectures import inputs, make


class Block(nn.Module):
    """Two linears that read the same tensor, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b(x)
        found: torch.Tensor = self.c(self.a(x))
        return found


def test_shared_inputs_are_gathered_once_and_padding_is_not() -> None:
    block, x = Block(), torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    gatherer = Gatherer(block, dict.fromkeys("abc", "linear"))
    with gatherer.hooked(), torch.no_grad():
        for _ in range(2):
            gatherer.begin((mask,))
            block(x)
    block(x)  # hooks are gone
    found = gatherer.statistics()
    rows = x[mask]
    assert found["a"].moment is found["b"].moment
    assert torch.allclose(torch.as_tensor(found["a"].moment), rows.T @ rows / 8, atol=1e-5)
    assert [found[name].tokens for name in "abc"] == [16, 16, 16]
    assert len(gatherer.sums) == 2


def test_experts_have_moments_over_their_own_tokens() -> None:
    model = make("qwen3_moe")
    path = "model.layers.0.mlp.experts"
    gatherer = Gatherer(model, {f"{path}.gate_up_proj": "experts", f"{path}.down_proj": "experts"})
    with torch.no_grad():
        before = model(**inputs("qwen3_moe")).logits
        with gatherer.hooked():
            gatherer.begin(())
            after = model(**inputs("qwen3_moe")).logits
    assert torch.allclose(before, after, atol=1e-5)
    found = gatherer.statistics()
    tokens = sum(one.tokens for name, one in found.items() if "gate_up_proj" in name)
    assert tokens == 2 * inputs("qwen3_moe")["input_ids"].numel()  # two experts a token
    assert torch.as_tensor(found[f"{path}.down_proj.{next(iter(found)).rpartition('.')[2]}"].moment).shape == (64, 64)


def test_saved_statistics_come_back_and_others_are_refused(tmp_path: Path) -> None:
    shared = torch.eye(4)
    given = {"a": Statistics(shared, 7), "b": Statistics(shared, 7), "c": Statistics(2 * torch.eye(3), 5)}
    saved = Saved(tmp_path / "s", {"text": "x"})
    assert saved.read("block.0") is None
    saved.write("block.0", given)
    found = Saved(tmp_path / "s", {"text": "x"}).read("block.0")
    assert found is not None
    assert {name: one.tokens for name, one in found.items()} == {"a": 7, "b": 7, "c": 5}
    assert torch.equal(torch.as_tensor(found["b"].moment), shared)
    assert found["a"].moment is found["b"].moment
    with pytest.raises(CheckpointError, match="was measured on something else"):
        Saved(tmp_path / "s", {"text": "y"}).read("block.0")


def test_moments_for_compress_are_read_by_module(tmp_path: Path) -> None:
    saved = Saved(tmp_path / "s", {"text": "x"})
    saved.write("block.0", {"block.0.a": Statistics(torch.eye(4), 7), "block.0.b": Statistics(2 * torch.eye(3), 7)})
    saved.write("block.1", {"block.1.a": Statistics(3 * torch.eye(4), 7)})
    found = read_moments(tmp_path / "s")
    assert {name: float(moment[0, 0]) for name, moment in found.items()} == {
        "block.0.a": 1, "block.0.b": 2, "block.1.a": 3,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="holds no statistics; make them with"):
        read_moments(tmp_path)
    save_file({"a": torch.eye(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights.safetensors holds no statistics; give the directory"):
        read_moments(tmp_path)
