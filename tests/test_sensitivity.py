"""sensitivity.py: the metric is what its equation says, the model is left alone, and it pays where it should."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitloft.errors import DataError, OptionError
from bitloft.integrations.loading import load
from bitloft.modules.linear import quant_linears
from bitloft.quantize import quantize
from bitloft.sensitivity import second_moments
from bitloft.tasks.lm import Collator, encode_rows
from bitloft.tasks.rows import read_rows
from tests.helpers import WORDS, write_rows


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sensitivity") / "base"
    quantize(tiny_model, out, format="lm4:32", rank=4)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, object]] = [{"text": WORDS[i:] + WORDS[:i]} for i in range(4)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def test_the_metric_is_its_equation(base: Path, data: Path) -> None:
    """Against gradients taken by autograd, one row at a time, with nothing of the module's own machinery."""
    found = second_moments(base, data, rows=2, length=48)
    model = load(base)
    assert set(found.inputs) == set(quant_linears(model))
    name = "model.layers.0.mlp.down_proj"
    from transformers import AutoTokenizer

    examples, _ = encode_rows(read_rows(data), AutoTokenizer.from_pretrained(base), 48)
    layer, inputs, outputs = model.get_submodule(name), torch.zeros(()), torch.zeros(())
    for example in examples[:2]:
        kept: list[Tensor] = []

        def replaced(module: nn.Module, args: tuple[Tensor], output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept += [args[0].detach(), output.detach().requires_grad_()]
            return kept[1]

        hook = layer.register_forward_hook(replaced)
        batch = Collator(0)([example])
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        hook.remove()
        x, slope = kept[0][0], kept[1].grad
        assert slope is not None
        slope = slope[0] * example.targets  # the model's loss is a mean, the metric's a sum
        inputs = inputs + (x * slope.square().sum(1, keepdim=True)).T @ x
        outputs = outputs + (slope * x.square().sum(1, keepdim=True)).T @ slope
    for side, total in ((found.inputs, inputs), (found.outputs, outputs)):
        torch.testing.assert_close(side[name], total / total.diagonal().mean(), rtol=1e-3, atol=1e-5)


def test_every_matrix_is_symmetric_positive_and_of_mean_one(base: Path, data: Path) -> None:
    found = second_moments(base, data, rows=3, length=32)
    assert found.inputs.keys() == found.outputs.keys()
    for moment in (*found.inputs.values(), *found.outputs.values()):
        assert torch.allclose(moment, moment.T)
        assert float(moment.diagonal().mean()) == pytest.approx(1.0, rel=1e-5)
        assert float(torch.linalg.eigvalsh(moment.double())[0]) > -1e-4


def test_a_loaded_model_is_left_as_it_was(base: Path, data: Path) -> None:
    model = load(base)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    found = second_moments(model, data, rows=1, length=32).inputs
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert found.keys() == second_moments(base, data, rows=1, length=32).inputs.keys()


def test_rows_are_bounded_by_what_is_asked(base: Path, data: Path) -> None:
    first, all_rows = (second_moments(base, data, rows=n, length=32).inputs for n in (1, 9))
    assert any(not torch.allclose(first[name], all_rows[name]) for name in first)
    with pytest.raises(OptionError, match="rows is 0; use 1 or more"):
        second_moments(base, data, rows=0)
    with pytest.raises(OptionError, match="length 100000 is beyond"):
        second_moments(base, data, length=100_000)
    assert inspect.signature(second_moments).parameters["rows"].default == 32


def test_a_model_whose_loss_reaches_nothing_is_refused(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, requires_grad=True), torch.zeros(1)

    monkeypatch.setattr("bitloft.sensitivity.target_losses", flat)
    with pytest.raises(DataError, match="reaches no linear layer; give other rows"):
        second_moments(base, data, rows=1, length=32)
