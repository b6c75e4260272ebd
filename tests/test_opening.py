"""Whatever an adapter was trained on opens as a model that runs: packed, dense, and what other tools quantized."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitloft.convert import convert
from bitloft.errors import CheckpointError
from bitloft.integrations.loading import load
from bitloft.integrations.opening import open_model, quantized_by
from bitloft.quantize import quantize

IDS = torch.arange(2, 22).unsqueeze(0)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("opening")
    quantize(tiny_model, root / "packed", format="nf4:32", rank=0, solver="qlora")
    convert(root / "packed", root / "bnb", to="bitsandbytes")
    return {"packed": root / "packed", "dense": tiny_model, "bnb": root / "bnb"}


def test_methods_are_read_from_the_config(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {name: quantized_by(folder) for name, folder in folders.items()}
    assert found == {"packed": "bitloft", "dense": None, "bnb": "bitsandbytes"}
    assert quantized_by(tmp_path) is None


@torch.no_grad()
def test_each_opens_and_runs(folders: dict[str, Path]) -> None:
    opened = {name: open_model(folder) for name, folder in folders.items()}
    for found in opened.values():
        assert found.tokenizer is not None
        assert not found.model.training
    assert opened["packed"].record is not None
    assert opened["bnb"].record is None
    logits = {name: found.model(IDS).logits for name, found in opened.items()}
    # the same nf4 numbers in two layouts
    torch.testing.assert_close(logits["bnb"], load(folders["packed"])(IDS).logits, rtol=1e-4, atol=1e-4)
    assert float((logits["bnb"] - logits["dense"]).abs().max()) > 1e-3


def test_a_bitsandbytes_base_that_lacks_a_tensor_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["bnb"].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    kept = {name: t for name, t in load_file(weights).items() if name != "model.norm.weight"}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.norm\.weight"):
        open_model(tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(tmp_path / "none" / "nowhere" / "at all")
