"""Refining a finished base on a tiny model: the loss falls, what is stored was measured, kills leave no trace."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitloft.calibrate import refine as module
from bitloft.checkpoint import write_manifest
from bitloft.errors import DataError, OptionError
from bitloft.integrations.loading import load
from bitloft.integrations.source import open_source
from bitloft.modules.linear import quant_linears
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from bitloft.quantize_report import QuantizeReport
from bitloft.stream import make_plan
from tests.helpers import WORDS


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty short sequences, of which four are held out."""
    for name, value in (("LENGTH", 16), ("BATCH", 2), ("HELD", 4)):
        monkeypatch.setattr(module, name, value)
    file = tmp_path / "text.txt"
    file.write_text(" ".join([WORDS] * 12), encoding="utf-8")
    return file


def made(model: Path, out: Path, text: Path, **settings: Any) -> QuantizeReport:
    given = {"format": "lm2:32", "rank": 8, "calibrate": str(text), "refine": 12, "refine_rate": 3e-3, **settings}
    return quantize(model, out, **given)


@pytest.mark.parametrize("parts", [("start",), ("start", "scales", "norms"), ("scales",), ("start", "scales", "codes")])
def test_the_loss_falls_and_the_base_holds_what_was_measured(
    tiny_model: Path, tmp_path: Path, text: Path, parts: tuple[str, ...]
) -> None:
    plain = quantize(tiny_model, tmp_path / "plain", format="lm2:32", rank=8)
    report = made(tiny_model, tmp_path / "refined", text, refine_parts=parts)
    found = report.refined
    assert found is not None
    assert found.kept
    assert found.parts == parts
    assert found.after.hidden < found.before.hidden
    assert found.teacher == "one of 2 blocks"
    assert report.fingerprint != plain.fingerprint
    assert [m.bytes for m in report.matrices] == [m.bytes for m in plain.matrices]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "refined"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "codes" in parts or not any(key.endswith("_proj.weight") for key in changed)
    assert any("norm" in key for key in changed) == ("norms" in parts)
    assert any(key.endswith("weight_scales") for key in changed) == ("scales" in parts)
    assert any(key.endswith(".a0") for key in changed) == ("start" in parts)
    dense = load_file(tiny_model / "model.safetensors")
    layers = quant_linears(load(tmp_path / "refined"))
    for matrix in report.matrices:
        weight = dense[f"{matrix.name}.weight"].float()
        error = (weight - layers[matrix.name].dense()).norm() / weight.norm()
        assert matrix.error_after == pytest.approx(float(error), rel=1e-5)


def test_against_the_teacher_the_divergence_falls(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    found = made(tiny_model, tmp_path / "refined", text, refine_against="teacher").refined
    assert found is not None
    assert (found.kept, found.against) == (True, "teacher")
    assert 0 < (found.after.next_token or 0) < (found.before.next_token or 0)


def test_a_model_that_scales_its_logits_is_refused(
    tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_model / "config.json"
    given = json.loads(config.read_text())
    scaled = tmp_path / "scaled"
    shutil.copytree(tiny_model, scaled)
    (scaled / "config.json").write_text(json.dumps(given | {"logits_scaling": 8.0}))
    with pytest.raises(OptionError, match="refine_against is teacher, and scaled scales what its head says"):
        made(scaled, tmp_path / "out", text, refine_against="teacher")
    with pytest.raises(OptionError, match="unknown refine_against 'labels'; use one of text, teacher"):
        made(tiny_model, tmp_path / "out", text, refine_against="labels")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitloft.calibrate.tuning.SAVE_EVERY", 5)
    settings: dict[str, Any] = {"refine_parts": ("start", "scales", "norms", "codes")}
    whole = made(tiny_model, tmp_path / "whole", text, **settings)

    def killed(done: int, total: int, what: str) -> None:
        if what.startswith("refining") and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tiny_model, tmp_path / "cut", text, progress=killed, **settings)
    monkeypatch.setattr("bitloft.calibrate.teacher.Teacher.open", lambda source: pytest.fail("asked again"))
    cut = made(tiny_model, tmp_path / "cut", text, resume=True, **settings)
    assert cut.fingerprint == whole.fingerprint
    assert cut.refined == whole.refined
    assert not (tmp_path / "cut.work").exists()


def test_a_run_killed_while_it_writes_does_not_refine_the_refined(
    tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"refine_parts": ("start", "scales")}
    whole = made(tiny_model, tmp_path / "whole", text, **settings)
    verb = sys.modules["bitloft.quantize"]  # the attribute of that name is the function

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tiny_model, tmp_path / "cut", text, **settings)
    monkeypatch.setattr(verb, "write_manifest", write_manifest)
    cut = made(tiny_model, tmp_path / "cut", text, resume=True, **settings)
    assert (cut.fingerprint, cut.refined) == (whole.fingerprint, whole.refined)


def test_a_tuning_that_does_not_help_is_dropped(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    plain = quantize(tiny_model, tmp_path / "plain", format="lm2:32", rank=8)
    report = made(tiny_model, tmp_path / "worse", text, refine_rate=30.0)
    assert report.refined is not None
    assert not report.refined.kept
    assert report.refined.after == report.refined.before
    assert report.fingerprint == plain.fingerprint
    assert report.matrices[0].error_after == plain.matrices[0].error_after


def test_the_report_is_in_the_directory(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    report = made(tiny_model, tmp_path / "base", text)
    held = json.loads((tmp_path / "base" / "bitloft_report.json").read_text())["refined"]
    assert module.RefineReport.read(held) == report.refined
    assert held["steps"] == 12


def test_what_cannot_be_refined_is_refused(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(OptionError, match="nothing to tune: this base has no start"):
        made(tiny_model, tmp_path / "out", text, rank=0)
    text.write_text("too short a text", encoding="utf-8")
    with pytest.raises(DataError, match=r"has \d+ sequences of 16 tokens; refining needs 96 tokens or more"):
        made(tiny_model, tmp_path / "out", text)
    with pytest.raises(OptionError, match="refine tunes on a text; give calibrate too"):
        quantize(tiny_model, tmp_path / "out", refine=3)
    with pytest.raises(OptionError, match="refine cannot tune codes of trellis2:32"):
        made(tiny_model, tmp_path / "out", text, format="trellis2:32", refine_parts=("start", "codes"))
    with pytest.raises(OptionError, match="unknown refine_parts 'biases'; use one of start, scales, norms, codes"):
        made(tiny_model, tmp_path / "out", text, refine_parts=("biases",))


def test_every_step_takes_trained_sequences_only(tiny_model: Path, text: Path) -> None:
    options, source = QuantizeOptions(refine=40, calibrate=str(text), seed=3), open_source(str(tiny_model))
    ids = module.sequences(source, make_plan(source, options), options)
    order = module._order(len(ids), options)
    assert len(order) >= 80
    assert min(order) == 4
    assert set(order) == set(range(4, len(ids)))


def test_codes_that_lie_by_column_are_refined_and_kept(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    settings: dict[str, Any] = {"format": "trellis2:32", "solver": "calibrated", "calibrate_length": 32, "samples": 4}
    report = made(tiny_model, tmp_path / "out", text, refine_parts=("start", "scales"), **settings)
    plain = quantize(tiny_model, tmp_path / "plain", rank=8, calibrate=str(text), **settings)
    assert report.refined is not None
    assert report.refined.kept
    assert [m.bytes for m in report.matrices] == [m.bytes for m in plain.matrices]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith("_proj.weight"))
