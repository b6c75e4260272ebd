"""rebase: an adapter moved to another base of its model, with a teacher and without, and everything that it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitloft.adapters import read_adapter
from bitloft.compress import compress
from bitloft.convert import convert
from bitloft.errors import AdapterError, BitloftError, CheckpointError, DataError, OptionError
from bitloft.evaluate import evaluate
from bitloft.integrations.record import base_record
from bitloft.quantize import quantize
from bitloft.rebase import RebaseReport, rebase
from bitloft.train import train
from tests.helpers import make_adapter, tiny_llama, write_record, write_rows

TEXT = "the quick brown fox jumps over the lazy dog . a base is frozen and packed ; an adapter is trained on it"


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two bases of one model, rows, and an adapter that was trained on the first."""
    root = tmp_path_factory.mktemp("rebase")
    quantize(tiny_model, root / "old", format="nf4:32", rank=2, steps=1)
    quantize(tiny_model, root / "new", format="lm2:64", rank=2, steps=1)
    rows = write_rows(root / "rows.jsonl", [{"text": TEXT}] * 20)
    train(root / "old", rows, root / "adapter", steps=30, rank=4, length=32, lr=5e-3, dtype="float32")
    return {name: root / name for name in ("old", "new", "adapter")} | {"rows": rows, "model": tiny_model}


def moved(world: dict[str, Path], out: Path, **settings: object) -> RebaseReport:
    asked = {"steps": 30, "length": 32, "lr": 2e-3, "dtype": "float32"} | settings
    return rebase(world["adapter"], world["new"], world["rows"], out, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_falls_and_is_what_eval_finds(world: dict[str, Path], tmp_path: Path, taught: bool) -> None:
    report = moved(world, tmp_path / "out", trained_on=world["old"] if taught else None)
    assert report.kept
    assert report.loss_after < report.loss_before < report.loss_base
    assert (report.loss_teacher is not None) is taught
    held = write_rows(tmp_path / "held.jsonl", [{"text": TEXT}] * 2)
    assert evaluate(world["new"], held, tmp_path / "out", length=32).loss == pytest.approx(report.loss_after, rel=1e-4)
    before = evaluate(world["new"], held, world["adapter"], length=32, base_mismatch="allow")
    assert before.loss == pytest.approx(report.loss_before, rel=1e-4)
    assert evaluate(world["new"], held, length=32).loss == pytest.approx(report.loss_base, rel=1e-4)
    if taught:
        assert evaluate(world["old"], held, world["adapter"], length=32).loss == pytest.approx(
            report.loss_teacher, rel=1e-4
        )


def test_what_is_written_is_plain_peft_of_the_new_base(world: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    from bitloft.integrations.loading import load

    before = {f.name: f.read_bytes() for f in world["adapter"].iterdir()}
    report = moved(world, tmp_path / "out")
    record = base_record(world["new"])
    written = json.loads((tmp_path / "out" / "bitloft_adapter.json").read_text())
    assert written == {"schema": 1, "base": record.fingerprint, "source": record.source, "start": "frozen"}
    assert json.loads((tmp_path / "out" / "rebase_report.json").read_text())["loss_after"] == report.loss_after
    assert report.rank == read_adapter(tmp_path / "out").pairs[0].a.shape[0] == 4
    assert report.model_bytes > 0
    PeftModel.from_pretrained(load(world["new"]), tmp_path / "out")
    assert before == {f.name: f.read_bytes() for f in world["adapter"].iterdir()}


def test_the_same_settings_give_the_same_bytes(world: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        moved(world, tmp_path / name, steps=4)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_packed_adapter_is_moved_too(world: dict[str, Path], tmp_path: Path) -> None:
    compress(world["adapter"], tmp_path / "packed", bits=2.5)
    report = rebase(
        tmp_path / "packed", world["new"], world["rows"], tmp_path / "out", trained_on=world["old"], steps=20, length=32
    )
    assert report.loss_after <= report.loss_before
    assert {p.name for p in read_adapter(tmp_path / "out").pairs} <= {
        p.name for p in read_adapter(world["adapter"]).pairs
    }


def test_teachers_of_other_kinds(world: dict[str, Path], tmp_path: Path) -> None:
    """An adapter without fingerprints, trained on the 16-bit model or on a bitsandbytes base."""
    quantize(world["model"], tmp_path / "nf4", format="nf4:32", rank=0, solver="qlora")
    convert(tmp_path / "nf4", tmp_path / "bnb", to="bitsandbytes")
    plain = make_adapter(tmp_path / "plain", scale=0.5)
    for number, teacher in enumerate((world["model"], tmp_path / "bnb")):
        report = rebase(
            plain, world["new"], world["rows"], tmp_path / f"out{number}", trained_on=teacher, steps=3, length=32
        )
        assert report.loss_teacher is not None
        assert "does not say of which model it is" in report.notes[0]


def test_steps_that_do_not_help_are_not_kept(world: dict[str, Path], tmp_path: Path) -> None:
    report = moved(world, tmp_path / "out", lr=50.0, steps=3)
    assert not report.kept
    assert report.loss_after >= report.loss_before
    assert "did not lower the held-out loss" in report.notes[-1]
    old, new = read_adapter(world["adapter"]), read_adapter(tmp_path / "out")
    for one, two in zip(old.pairs, new.pairs, strict=True):
        torch.testing.assert_close(one.scaling * one.b @ one.a, two.scaling * two.b @ two.a, rtol=1e-4, atol=1e-6)


def test_what_has_nowhere_to_go_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    out, rows = tmp_path / "out", world["rows"]
    with pytest.raises(AdapterError, match="was trained for this base; there is nothing to move"):
        rebase(world["adapter"], world["old"], rows, out)
    other = make_adapter(tmp_path / "other")
    write_record(other, "e" * 64, "d" * 64)
    with pytest.raises(AdapterError, match=r"is of another model \(fingerprint dddddddddddd\)"):
        rebase(other, world["new"], rows, out)
    with pytest.raises(AdapterError, match="was trained for the base"):
        moved(world, out, trained_on=world["new"])
    with pytest.raises(CheckpointError, match="is not a bitloft base"):
        rebase(world["adapter"], world["model"], rows, out)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        moved(world, tmp_path / "there")
    assert not out.exists()


def test_hostile_adapters_data_and_settings_leave_nothing(world: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    wide = tiny_llama(tmp_path / "wide", hidden=128)
    quantize(wide, tmp_path / "widebase", format="nf4:32", rank=0, solver="qlora")
    with pytest.raises(AdapterError, match=r"adapts model\.layers\.0\.mlp\.down_proj as"):
        rebase(make_adapter(tmp_path / "a"), tmp_path / "widebase", world["rows"], out, length=32)
    zero = make_adapter(tmp_path / "zero")
    tensors = {k: t * ("lora_A" in k) for k, t in load_file(zero / "adapter_model.safetensors").items()}
    save_file(tensors, zero / "adapter_model.safetensors", metadata={"format": "pt"})
    report = rebase(zero, world["new"], world["rows"], tmp_path / "fresh", steps=20, length=32, lr=5e-3)
    assert report.loss_before == pytest.approx(report.loss_base, rel=1e-5)
    assert report.loss_after < report.loss_before  # it learns from nothing, and no factor is dead
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a base"}])
    with pytest.raises(DataError, match="give two or more"):
        rebase(world["adapter"], world["new"], one, out, length=32)
    with pytest.raises(OptionError, match="length 512 is beyond the 256 positions"):
        rebase(world["adapter"], world["new"], world["rows"], out, length=512)
    for settings in ({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"batch": -1}, {"length": 1}, {"dtype": "int8"}):
        with pytest.raises(OptionError):
            moved(world, out, **settings)
    with pytest.raises(BitloftError, match="the loss became nan"):
        moved(world, out, lr=1e30)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
