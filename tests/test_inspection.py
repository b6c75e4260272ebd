"""inspect tells what the files hold, also where the report is gone."""

from pathlib import Path

import pytest

from bitloft.compress import compress
from bitloft.errors import CheckpointError
from bitloft.inspection import inspect, machine
from bitloft.quantize import quantize
from tests.helpers import make_adapter


def test_a_base_by_module(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "b", format="lm2:64", rank=4)
    found = inspect(tmp_path / "b")
    assert found.kind == "base"
    assert found.summary["true bits"] == pytest.approx(report.true_bits)
    assert found.summary["true bits with start"] == pytest.approx(report.true_bits_with_start)
    rows = {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    for matrix in report.matrices:
        row = rows[matrix.name]
        assert row["payload bits"] == 2.0
        assert row["with start"] == matrix.error_after
        assert row["true bits"] == pytest.approx(8 * matrix.bytes / (matrix.shape[0] * matrix.shape[1]))


def test_without_a_report_the_headers_answer(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "b", format="uniform3:64", rank=4)
    (tmp_path / "b" / "bitloft_report.json").unlink()
    (tmp_path / "b" / "manifest.json").unlink()
    found = inspect(tmp_path / "b")
    assert found.summary["fingerprint"] == "no manifest"
    down = next(row for row in found.rows if str(row[0]).endswith("0.mlp.down_proj"))
    assert down[2] == "64 x 128"  # 96 columns padded to whole groups
    assert len(found.rows) == len(report.matrices)


def test_a_plain_adapter(tmp_path: Path) -> None:
    found = inspect(make_adapter(tmp_path / "a"))
    assert found.kind == "adapter"
    assert len(found.rows) == 14
    assert found.rows[0][3] == 2.0  # alpha 8 / rank 4


def test_a_packed_adapter_by_module(tmp_path: Path) -> None:
    report = compress(make_adapter(tmp_path / "a"), tmp_path / "p", bits=3.0)
    found = inspect(tmp_path / "p")
    assert found.kind == "packed adapter"
    assert found.summary["true bits"] == report.true_bits
    rows = {str(row[0]): dict(zip(found.columns, row, strict=True)) for row in found.rows}
    for module in report.modules:
        row = rows[module.name]
        assert row["error"] == pytest.approx(module.error, abs=1e-3)
        assert row["true bits"] == pytest.approx(module.bits)
        assert float(str(row["payload bits"])) < float(str(row["true bits"]))


def test_other_places_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        inspect(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no base and no adapter"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="did not quantize"):
        inspect(tiny_model)


def test_machine_names_versions_and_kernels() -> None:
    facts = machine()
    assert {"bitloft", "torch", "transformers", "peft", "kernels", "threads"} <= set(facts)
