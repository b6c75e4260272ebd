"""An adapter on its base while it is packed: a mismatch is measured, codes are distilled, bad input is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitloft.adapters import CONFIG_FILE, PackedAdapter, read_packed
from bitloft.bulk import compress_all
from bitloft.checkpoint import MANIFEST
from bitloft.compress import CompressReport, compress
from bitloft.errors import AdapterError, CheckpointError, DataError, OptionError
from bitloft.evaluate import evaluate
from bitloft.inspection import inspect
from bitloft.integrations.record import base_record
from bitloft.options import CompressOptions
from bitloft.quantize import quantize
from bitloft.sensitivity import second_moments
from bitloft.train import train
from tests.helpers import make_adapter, write_record, write_rows

TEXT = "the quick brown fox jumps over the lazy dog . a base is frozen and packed ; an adapter is trained on it"


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, another one of two bits, rows, and an adapter that was trained on the first."""
    root = tmp_path_factory.mktemp("ground")
    quantize(tiny_model, root / "base", format="nf4:32", rank=2, steps=1)
    quantize(tiny_model, root / "two", format="lm2:64", rank=2, steps=1)
    rows = write_rows(root / "rows.jsonl", [{"text": TEXT}] * 20)
    train(root / "base", rows, root / "adapter", steps=40, rank=8, length=32, lr=5e-3, dtype="float32")
    return {name: root / name for name in ("base", "two", "adapter")} | {"rows": rows, "model": tiny_model}


def distilled(world: dict[str, Path], out: Path, **settings: Any) -> CompressReport:
    asked: dict[str, Any] = {"bits": 1.5, "distill": 16, "length": 32} | settings
    return compress(world["adapter"], out, base=world["base"], data=world["rows"], **asked)


@pytest.mark.parametrize("codes", [True, False])
def test_distilling_lowers_the_loss_at_the_same_size(world: dict[str, Path], tmp_path: Path, codes: bool) -> None:
    report = distilled(world, tmp_path / "out", distill_codes=codes)
    found = report.distilled
    assert found is not None
    assert found.kept
    assert found.loss_after < found.loss_before
    assert 0.98 * 1.5 <= report.true_bits <= 1.5
    held = write_rows(tmp_path / "held.jsonl", [{"text": TEXT}] * 2)
    assert evaluate(world["base"], held, tmp_path / "out", length=32).loss == pytest.approx(found.loss_after, rel=1e-4)
    assert evaluate(world["base"], held, world["adapter"], length=32).loss == pytest.approx(found.loss_full, rel=1e-4)
    packed = read_packed(tmp_path / "out")
    assert packed.method["distill"] == 16
    assert packed.method.get("distill_codes", True) is codes
    assert packed.error == pytest.approx(report.error, rel=1e-2)  # of what is stored now, not of what was solved


def test_twice_the_same_bytes(world: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        distilled(world, tmp_path / name, distill=3)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_distillation_that_does_not_help_is_left_out(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitloft.ground.RATE", 2.0)
    report = distilled(world, tmp_path / "out", distill=4)
    assert report.distilled is not None
    assert not report.distilled.kept
    assert report.distilled.loss_after >= report.distilled.loss_before
    held = write_rows(tmp_path / "held.jsonl", [{"text": TEXT}] * 2)
    packed = evaluate(world["base"], held, tmp_path / "out", length=32)
    assert packed.loss == pytest.approx(report.distilled.loss_before, rel=1e-4)


def test_the_sentence_goes_into_report_manifest_and_inspection(world: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", rank=8)
    write_record(adapter, "f" * 64, base_record(world["base"]).source)
    report = compress(adapter, tmp_path / "out", base=world["base"], bits=3.0)
    assert report.mismatch is not None
    assert (
        "trained for another base (fingerprint ffffffffffff) of the same model; on this base (4 bit)" in report.mismatch
    )
    assert "tokens of the built-in text" in report.mismatch
    packed = read_packed(tmp_path / "out")
    assert packed.mismatch == report.mismatch
    assert packed.base == "f" * 64  # where it was trained stays true
    assert packed.true_bits <= 3.0  # the sentence is counted
    assert inspect(tmp_path / "out").summary["it was"] == report.mismatch
    on_rows = compress(adapter, tmp_path / "rows", base=world["base"], data=world["rows"], bits=3.0)
    assert "tokens of rows.jsonl." in str(on_rows.mismatch)
    both = compress(adapter, tmp_path / "both", base=world["base"], trained_on=world["model"], bits=3.0)
    assert ", on its own by " in str(both.mismatch)
    named = compress(world["adapter"], tmp_path / "named", base=world["base"], bits=3.0)
    assert named.mismatch is None
    assert "mismatch" not in json.loads((tmp_path / "named" / MANIFEST).read_text())


def test_mismatches_are_refused_by_default_where_bits_are_few(world: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match=r"of the same model; .*two \(2 bit\)"):
        compress(world["adapter"], out, base=world["two"], bits=3.0)
    unmarked = make_adapter(tmp_path / "unmarked", rank=8)
    for base in (world["base"], world["two"]):
        with pytest.raises(AdapterError, match="made without a fingerprint, for 'tiny' by name"):
            compress(unmarked, out, base=base, bits=3.0)
    assert not out.exists()
    allowed = compress(unmarked, out, base=world["two"], bits=3.0, base_mismatch="allow")
    assert "allowed here without a measurement" in str(allowed.mismatch)
    with pytest.raises(AdapterError, match="was trained for the base"):
        compress(
            world["adapter"],
            tmp_path / "no",
            base=world["two"],
            trained_on=world["two"],
            base_mismatch="measure",
            bits=3.0,
        )


def test_bulk_runs_say_it_in_the_row(world: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(tmp_path / "in" / "unmarked", rank=8)
    options = CompressOptions(bits=4.0, base_mismatch="measure")
    row = compress_all(tmp_path / "in", tmp_path / "out", options, base=world["two"]).rows[0]
    assert row.state == "packed"
    assert "changes the loss" in row.reason
    row = compress_all(tmp_path / "in", tmp_path / "no", CompressOptions(bits=4.0), base=world["two"]).rows[0]
    assert row.state == "failed"
    assert "without a fingerprint" in row.reason
    with pytest.raises(OptionError, match="distill learns from one adapter's own data"):
        compress_all(tmp_path / "in", tmp_path / "out", CompressOptions(distill=5), base=world["two"])
    with pytest.raises(OptionError, match="weigh measures one adapter's own data"):
        compress_all(tmp_path / "in", tmp_path / "out", CompressOptions(weigh=5), base=world["two"])


def test_weighing_counts_errors_by_the_loss_of_the_data(world: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"bits": 3.0, "refine": False}
    weighed = compress(world["adapter"], tmp_path / "w", base=world["base"], data=world["rows"], weigh=2, **given)
    found = second_moments(world["base"], world["rows"], rows=2, length=CompressOptions().length)
    same = compress(world["adapter"], tmp_path / "s", moments=found.inputs, gradients=found.outputs, **given)
    assert (weighed.method["metric"], weighed.method["weigh"]) == ("inputs+outputs", 2)
    # layers that are arranged sum in another order, and a walk may take another way
    assert weighed.weighed_error == pytest.approx(same.weighed_error, rel=0.05)
    blind = compress(world["adapter"], tmp_path / "b", **given)
    assert weighed.error > blind.error
    assert "metric" not in blind.method


def test_options_that_need_each_other(world: dict[str, Path], tmp_path: Path) -> None:
    adapter, out = world["adapter"], tmp_path / "out"
    with pytest.raises(OptionError, match="distill runs the base on text; give base and data"):
        compress(adapter, out, base=world["base"], distill=3)
    with pytest.raises(OptionError, match="weigh runs the base on text; give base and data"):
        compress(adapter, out, data=world["rows"], weigh=3)
    with pytest.raises(OptionError, match="weigh measures what moments and gradients say"):
        compress(adapter, out, base=world["base"], data=world["rows"], weigh=3, gradients={"x": torch.eye(2)})
    with pytest.raises(OptionError, match="data is about an adapter on a base; give base too"):
        compress(adapter, out, data=world["rows"])
    with pytest.raises(OptionError, match="base_mismatch is about an adapter on a base"):
        compress(adapter, out, base_mismatch="allow")
    with pytest.raises(OptionError, match="distill does not apply to method loraquant"):
        CompressOptions(method="loraquant", distill=3)
    for settings in ({"distill": 0}, {"distill_codes": False}, {"length": 1}, {"batch": 0}, {"base_mismatch": "no"}):
        with pytest.raises(OptionError):
            CompressOptions(**settings)
    assert not out.exists()


def test_hostile_data_and_adapters_leave_nothing(world: dict[str, Path], tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a base"}])
    with pytest.raises(DataError, match="give two or more"):
        compress(world["adapter"], tmp_path / "out", base=world["base"], data=one, distill=5, length=32)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"texts": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        compress(world["adapter"], tmp_path / "out", base=world["base"], data=bad, distill=3)
    with pytest.raises(OptionError, match="length 512 is beyond the 256 positions"):
        distilled(world, tmp_path / "out", length=512)
    zero = make_adapter(tmp_path / "zero", rank=8, base=world["base"])
    tensors = {k: t * ("lora_A" in k) for k, t in load_file(zero / "adapter_model.safetensors").items()}
    save_file(tensors, zero / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OptionError, match="packs to nothing; there is nothing to distill"):
        compress(zero, tmp_path / "out", base=world["base"], data=world["rows"], distill=5, bits=3.0, length=32)
    assert not (tmp_path / "out").exists()


def test_a_manifest_whose_mismatch_is_no_text_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    from bitloft.adapter_files import serialize

    compress(world["adapter"], tmp_path / "out", bits=3.0)
    packed: PackedAdapter = read_packed(tmp_path / "out")
    record = {key: getattr(packed, key) for key in ("base", "source", "start", "method", "values", "error")}
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    for name, data in serialize(config, list(packed.modules.values()), record | {"mismatch": ["x"]}).items():
        (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"gives mismatch as \['x'\]; it must be a text"):
        read_packed(tmp_path / "out")
