"""The journal: what it says is done is done; a run goes on only as it was begun, and never twice at once."""

import os
from pathlib import Path

import pytest

from bitloft.errors import CheckpointError
from bitloft.journal import JOURNAL, check_free, work_directory, working

IDENTITY = {"rank": 4, "target": ("a", "b")}


def failing(out: Path, error: BaseException, *steps: str) -> None:
    """A run that finishes some steps, then ends with ``error``."""
    with working(out, IDENTITY) as journal:
        for step in steps:
            (journal.directory / step).write_text(step)
            journal.add(step, {"seconds": 1.0})
        raise error


def interrupted(out: Path, *steps: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        failing(out, KeyboardInterrupt(), *steps)


def test_a_finished_run_is_renamed_and_leaves_nothing_else(tmp_path: Path) -> None:
    with working(tmp_path / "out", IDENTITY) as journal:
        (journal.directory / "file").write_text("x")
        journal.add("a", {})
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_finished_steps_stay_and_come_back(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "a", "b")
    with working(tmp_path / "out", IDENTITY, resume=True) as journal:
        assert journal.done == {"a": {"seconds": 1.0}, "b": {"seconds": 1.0}}
        assert (journal.directory / "b").read_text() == "b"


def test_with_nothing_finished_nothing_stays(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "a")
    with pytest.raises(CheckpointError, match="holds an interrupted run; resume it"), working(tmp_path / "out", {}):
        pass
    with working(tmp_path / "out", {}, overwrite=True) as journal:
        assert journal.done == {}
        assert not (journal.directory / "a").exists()


def test_another_identity_is_refused_by_name_and_keeps_the_run(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "a")
    other = IDENTITY | {"target": ("a",)}
    with (
        pytest.raises(CheckpointError, match=r"had target \['a', 'b'\], now it is \['a'\]; resume with the same"),
        working(tmp_path / "out", other, resume=True),
    ):
        pass
    with working(tmp_path / "out", IDENTITY, resume=True) as journal:
        assert set(journal.done) == {"a"}


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "a", "b")
    file = work_directory(tmp_path / "out") / JOURNAL
    file.write_bytes(file.read_bytes()[:-3])
    with working(tmp_path / "out", IDENTITY, resume=True) as journal:
        assert set(journal.done) == {"a"}
        journal.add("b", {})
        lines = file.read_bytes().splitlines()
        assert len(lines) == 3


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}"])
def test_a_damaged_journal_is_refused_and_kept(tmp_path: Path, line: bytes) -> None:
    interrupted(tmp_path / "out", "a")
    file = work_directory(tmp_path / "out") / JOURNAL
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(CheckpointError, match="journal of the interrupted run is damaged"):
        working(tmp_path / "out", IDENTITY, resume=True).__enter__()
    assert file.exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with working(tmp_path / "out", IDENTITY) as journal:
        journal.add("a", {})
        with (
            pytest.raises(CheckpointError, match="another process is working in"),
            working(tmp_path / "out", IDENTITY, resume=True),
        ):
            pass
    assert (tmp_path / "out").exists()


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    full = OSError(28, os.strerror(28))
    with pytest.raises(CheckpointError, match="No space left on device; nothing was left there"):
        failing(tmp_path / "out", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; what is finished stays in .*out.work: free"):
        failing(tmp_path / "out", full, "a")
    assert (tmp_path / "out.work").exists()


def test_bad_input_after_finished_steps_says_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor x is bad. What is finished stays in .*out.work"):
        failing(tmp_path / "out", CheckpointError("tensor x is bad."), "a")


def test_an_existing_out_is_kept_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(CheckpointError, match="exists already"), working(tmp_path / "out", {}):
        pass
    with working(tmp_path / "out", {}, overwrite=True) as journal:
        (journal.directory / "new").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_what_a_kill_after_the_rename_leaves_is_swept(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "a")
    (tmp_path / "out.work" / "out").rename(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        check_free(tmp_path / "out", overwrite=False, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
