"""Fisher weights: squares of the gradients that autograd gives for outputs, refused where there is no loss, used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitloft.calibrate.gradients import LEAST, output_weights
from bitloft.calibrate.text import Batch, read_batches
from bitloft.errors import OptionError
from bitloft.integrations.source import open_source
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from bitloft.tasks.precision import Precision
from tests.architectures import make
from tests.helpers import WORDS, tiny_tokenizer


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bitloft.calibrate.gradients.choose_precision", lambda asked, device: Precision(torch.float32, "asked for")
    )


def test_weights_are_mean_squared_gradients(tiny_model: Path) -> None:
    """Against the gradient of a bias that every position has for itself."""
    name = "model.layers.0.mlp.down_proj"
    ids = torch.arange(2, 14).view(2, 6)
    found = output_weights(open_source(str(tiny_model)), [Batch({"input_ids": ids})])[name]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    total = torch.zeros(64)
    for row in ids:
        shift = torch.zeros(1, 6, 64, requires_grad=True)
        handle = model.get_submodule(name).register_forward_hook(lambda m, args, out, shift=shift: out + shift)
        logits = model(row.unsqueeze(0)).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[1:], reduction="sum").backward()
        handle.remove()
        assert shift.grad is not None
        total += shift.grad.square().sum((0, 1))
    wanted = total / 10  # five targets a row
    assert torch.allclose(found, wanted.clamp_min(LEAST * float(wanted.mean())), rtol=1e-3)


def test_padding_has_no_loss(tiny_model: Path) -> None:
    ids, source = torch.arange(2, 8).view(1, 6), open_source(str(tiny_model))
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    plain = output_weights(source, [Batch({"input_ids": ids})])
    found = output_weights(source, [Batch({"input_ids": padded, "attention_mask": mask})])
    assert all(torch.allclose(found[name], plain[name], rtol=1e-3) for name in plain)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_other_decoders_have_them_too(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    model = make(name, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    (tmp_path / "t.txt").write_text(" ".join([WORDS] * 20), encoding="utf-8")
    batches = read_batches(tmp_path / "t.txt", model, tokenizer, samples=4, length=16)
    found = output_weights(open_source(str(tmp_path)), batches)
    assert len(found) > 4
    assert all(bool(torch.isfinite(rows).all()) and float(rows.min()) > 0 for rows in found.values())


def test_an_encoder_is_refused_and_so_is_another_solver(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=r"next-token loss, which Bert\w+ does not have"):
        output_weights(open_source(str(tmp_path)), [])
    with pytest.raises(OptionError, match="fisher weighs the errors of the solver calibrated"):
        QuantizeOptions(fisher=True)


def test_the_run_keeps_and_uses_them(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(" ".join([WORDS] * 20), encoding="utf-8")
    given: dict[str, Any] = {
        "format": "lm2:32",
        "solver": "calibrated",
        "rank": 4,
        "calibrate": str(tmp_path / "t.txt"),
    }
    given |= {"samples": 8, "calibrate_length": 16, "rounds": 1, "statistics": str(tmp_path / "s")}
    plain = quantize(tiny_model, tmp_path / "plain", **given)
    report = quantize(tiny_model, tmp_path / "out", fisher=True, **given)
    assert report.fingerprint != plain.fingerprint
    assert report.calibration is not None
    assert set(report.calibration.seconds) == {"gradients", "solve", "advance"}
    kept = load_file(tmp_path / "s" / "gradients.safetensors")
    assert kept["model.layers.1.mlp.down_proj"].shape == (64,)
    again = quantize(tiny_model, tmp_path / "again", fisher=True, **given)
    assert again.fingerprint == report.fingerprint
