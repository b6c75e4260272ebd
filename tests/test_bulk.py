"""Compressing a directory: rows, resumption, failures that stop nobody, processes that give the same bytes."""

import json
import shutil
from pathlib import Path

import pytest

from bitloft import bulk
from bitloft.adapters import read_packed
from bitloft.bulk import adapters_in, compress_all, holds_adapters
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.ray import Cluster
from bitloft.options import CompressOptions
from tests.test_compress import large_adapter


@pytest.fixture
def several(tmp_path: Path) -> Path:
    for i in range(3):
        large_adapter(tmp_path / "in" / f"a{i}", seed=i, modules=2)
    return tmp_path / "in"


def test_every_adapter_becomes_a_row_a_directory_and_a_report(several: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = compress_all(several, tmp_path / "out", CompressOptions(bits=1.2), progress=lambda *s: seen.append(s))
    assert [(row.name, row.state) for row in report.rows] == [(f"a{i}", "packed") for i in range(3)]
    assert seen == [(i + 1, 3, f"a{i}") for i in range(3)]
    for row in report.rows:
        packed = read_packed(tmp_path / "out" / row.name)
        assert row.true_bits == packed.true_bits
        record = json.loads((tmp_path / "out" / "reports" / f"{row.name}.json").read_text())
        assert record["sha256"] == packed.sha256
        assert [m["name"] for m in record["modules"]] == ["layers.0.q_proj", "layers.1.q_proj"]
        assert sum(record["modules"][0]["spectrum"]) == pytest.approx(1, abs=1e-4)
    html = (tmp_path / "out" / "reports" / "index.html").read_text()
    assert all(word in html for word in ("a0", "a2", "layers.1.q_proj", "data:image/svg+xml"))
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["rows"]) == 3


def test_a_second_run_keeps_what_is_there_and_finishes_the_rest(several: Path, tmp_path: Path) -> None:
    compress_all(several, tmp_path / "out", CompressOptions(bits=1.2))
    shutil.rmtree(tmp_path / "out" / "a1")
    before = (tmp_path / "out" / "a0" / "manifest.json").stat().st_mtime_ns
    report = compress_all(several, tmp_path / "out", CompressOptions(bits=1.2))
    assert [row.state for row in report.rows] == ["kept", "packed", "kept"]
    assert (tmp_path / "out" / "a0" / "manifest.json").stat().st_mtime_ns == before


def test_a_run_killed_between_an_adapter_and_its_record_goes_on(several: Path, tmp_path: Path) -> None:
    compress_all(several, tmp_path / "out", CompressOptions(bits=1.2))
    record = tmp_path / "out" / "reports" / "a1.json"
    whole = json.loads(record.read_text())
    record.write_text(json.dumps({"source": whole["source"]}))
    report = compress_all(several, tmp_path / "out", CompressOptions(bits=1.2))
    assert [row.state for row in report.rows] == ["kept", "packed", "kept"]
    assert json.loads(record.read_text())["sha256"] == whole["sha256"]


def test_other_settings_or_another_source_are_not_mistaken_for_a_finished_run(several: Path, tmp_path: Path) -> None:
    compress_all(several, tmp_path / "out", CompressOptions(bits=1.2))
    shutil.rmtree(several / "a0")
    large_adapter(several / "a0", seed=9, modules=2)
    report = compress_all(several, tmp_path / "out", CompressOptions(bits=1.2))
    assert [row.state for row in report.rows] == ["failed", "kept", "kept"]
    assert "packed from another source or with other settings" in report.rows[0].reason
    again = compress_all(several, tmp_path / "out", CompressOptions(bits=1.3))
    assert again.count("failed") == 3


def test_a_bad_adapter_is_a_row_and_the_others_are_packed(several: Path, tmp_path: Path) -> None:
    (several / "a1" / "adapter_model.safetensors").write_bytes(b"junk")
    shutil.copy(several / "a2" / "adapter_config.json", several / "loose.json")
    (several / "empty").mkdir()
    report = compress_all(several, tmp_path / "out", CompressOptions(bits=1.2))
    assert [row.state for row in report.rows] == ["packed", "failed", "packed"]
    assert "a1" in report.rows[1].reason
    assert not (tmp_path / "out" / "a1").exists()


def test_two_processes_write_the_same_bytes(several: Path, tmp_path: Path) -> None:
    compress_all(several, tmp_path / "one", CompressOptions(bits=1.2))
    report = compress_all(several, tmp_path / "two", CompressOptions(bits=1.2), jobs=2)
    assert [row.state for row in report.rows] == ["packed"] * 3
    for name in ("a0", "a1", "a2"):
        for file in (tmp_path / "one" / name).iterdir():
            assert file.read_bytes() == (tmp_path / "two" / name / file.name).read_bytes()


def test_what_is_no_directory_of_adapters(several: Path, tmp_path: Path) -> None:
    assert holds_adapters(several)
    assert not holds_adapters(several / "a0")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        adapters_in(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        adapters_in(tmp_path / "absent")
    with pytest.raises(OptionError, match="jobs is 0; use 1 or more"):
        compress_all(several, tmp_path / "out", jobs=0)
    large_adapter(several / "reports", modules=1)
    with pytest.raises(CheckpointError, match="is named 'reports', where reports are written"):
        compress_all(several, tmp_path / "out")


def test_workers_of_a_cluster_write_the_same_bytes(ray_cluster: None, several: Path, tmp_path: Path) -> None:
    (several / "bad").mkdir()
    (several / "bad" / "adapter_config.json").write_text("{")
    here = compress_all(several, tmp_path / "here", CompressOptions(bits=1.2))
    there = compress_all(several, tmp_path / "there", CompressOptions(bits=1.2), cluster=Cluster(workers=2))
    assert [(row.name, row.state) for row in there.rows] == [(row.name, row.state) for row in here.rows]
    for name in ("a0", "a1", "a2"):
        for file in (tmp_path / "here" / name).iterdir():
            assert file.read_bytes() == (tmp_path / "there" / name / file.name).read_bytes()
    assert not (tmp_path / "there" / "reports" / bulk.SIGN).exists()
    again = compress_all(several, tmp_path / "there", CompressOptions(bits=1.2), cluster=Cluster(workers=2))
    assert again.count("kept") == 3


def test_a_node_that_does_not_see_the_directory_and_jobs_beside_a_cluster(several: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "reports").mkdir(parents=True)
    place = (tmp_path / "out", CompressOptions(), None, None)
    sign = bulk._signed(tmp_path / "out")
    assert bulk._sees(sign, *place) == place
    for wrong in ((tmp_path / "elsewhere", *place[1:]), place):
        with pytest.raises(CheckpointError, match=r"does not see .* put it on shared storage"):
            bulk._sees(sign if wrong is not place else "other", *wrong)
    with pytest.raises(OptionError, match="leave jobs at 1"):
        compress_all(several, tmp_path / "out", CompressOptions(bits=1.2), jobs=2, cluster=Cluster(workers=2))
