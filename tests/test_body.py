"""A dense model whose parts come and go: the same forward as the whole model, values of a dropped part gone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bitloft.errors import OptionError
from bitloft.integrations.body import Body
from bitloft.integrations.source import open_source


def test_filled_it_is_the_model_and_dropped_it_holds_nothing(tiny_model: Path) -> None:
    body = Body(open_source(str(tiny_model)))
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = torch.arange(3, 19).view(2, 8)
    body.fill_all_but(["model.layers.0", "model.layers.1"])
    assert {n for n, p in body.model.named_parameters() if p.is_meta} == set(
        body.within("model.layers.0", "model.layers.1")
    )
    body.fill(body.within("model.layers.0", "model.layers.1"))
    with torch.no_grad():
        assert torch.equal(body.model(input_ids=ids).logits, whole(input_ids=ids).logits)
    body.drop("model.layers.0")
    assert all(p.is_meta for p in body.model.get_submodule("model.layers.0").parameters())
    assert not any(p.is_meta for p in body.model.get_submodule("model.layers.1").parameters())
    body.stay()
    body.drop("model.layers.0")
    assert not any(p.is_meta for p in body.model.parameters())


def test_a_model_of_no_known_class_cannot_be_run(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(16, 16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["NobodysModel"]}', encoding="utf-8")
    with pytest.raises(OptionError, match="of no architecture that transformers knows; it cannot be run"):
        Body(open_source(str(tmp_path)))
