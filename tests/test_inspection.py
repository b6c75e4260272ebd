"""inspect tells what the files hold, also where the report is gone."""

from pathlib import Path

import pytest

from bitloft.compress import compress
from bitloft.errors import CheckpointError
from bitloft.inspection import compare, inspect, machine, page_of
from bitloft.quantize import quantize
from tests.helpers import make_adapter


def test_a_base_by_module(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "b", format="lm2:64", rank=4)
    found = inspect(tmp_path / "b")
    assert found.kind == "base"
    assert found.summary["true bits"] == pytest.approx(report.true_bits)
    assert found.summary["true bits with start"] == pytest.approx(report.true_bits_with_start)
    rows = {str(row[0]): dict(zip(found.columns, row, strict=True)) for row in found.rows}
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


def test_mixed_formats_and_ranks_are_counted_from_the_files(tiny_model: Path, tmp_path: Path) -> None:
    rules, ranks = ("q_proj=nf4:64",), ("v_proj=0",)
    report = quantize(tiny_model, tmp_path / "b", format="nf2:64", rank=2, rules=rules, rank_for=ranks)
    rows = {row[0]: row for row in inspect(tmp_path / "b").rows}
    for matrix in report.matrices:
        row = rows[matrix.name]
        assert row[1] == matrix.format
        assert (row[3], row[4]) == (8 * matrix.bytes / matrix.weights, 8 * matrix.start_bytes / matrix.weights)
    assert rows["model.layers.0.self_attn.q_proj"][5] == 4.0
    assert rows["model.layers.0.self_attn.v_proj"][4] == 0.0


def test_two_bases_side_by_side(tiny_model: Path, tmp_path: Path) -> None:
    one = quantize(tiny_model, tmp_path / "one", format="nf2:64", rank=2)
    other = quantize(tiny_model, tmp_path / "other", format="nf4:64", rank=2, skip=("up_proj",))
    found = compare(tmp_path / "one", tmp_path / "other")
    assert found.kind == "comparison"
    rows = {str(row[0]): dict(zip(found.columns, row, strict=True)) for row in found.rows}
    assert len(rows) == 12
    errors = [{m.name: m.error_after for m in report.matrices} for report in (one, other)]
    for name, row in rows.items():
        assert (row["format A"], row["format B"]) == ("nf2:64", "nf4:64")
        assert (row["error A"], row["error B"]) == (errors[0][name], errors[1][name])
        assert row["change"] == f"{errors[1][name] / errors[0][name] - 1:+.1%}"
        assert str(row["change"]).startswith("-")
    assert found.summary["only in one"] == f"2 in {tmp_path / 'one'}"
    assert found.summary["true bits"] == f"{one.true_bits:.4g} | {other.true_bits:.4g}"
    assert found.summary["source"] == inspect(tmp_path / "one").summary["source"]


def test_only_bases_are_compared(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "b", format="nf2:64", rank=2, target=("q_proj",))
    quantize(tiny_model, tmp_path / "c", format="nf2:64", rank=2, target=("k_proj",))
    with pytest.raises(CheckpointError, match="is no base but of kind 'adapter'; bases are compared with bases"):
        compare(tmp_path / "b", make_adapter(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="have no packed module in common"):
        compare(tmp_path / "b", tmp_path / "c")


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


def test_a_page_holds_facts_table_and_plot(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "b", format="lm2:64", rank=4)
    made = page_of(inspect(tmp_path / "b"), "b")
    assert report.fingerprint in made
    assert all(matrix.name in made for matrix in report.matrices)
    assert "data:image/svg+xml" in made
    assert "<script" not in made
