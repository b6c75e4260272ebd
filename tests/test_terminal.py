"""What commands print: tables that hold their figures, and progress that speaks on a pipe too."""

import pytest

from bitloft import terminal


def test_tables_hold_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.emit(terminal.table(("a", "b"), [("x", 1.23456), ("y", 2)]))
    out = capsys.readouterr().out
    assert "1.235" in out
    assert "y" in out


def test_progress_ends_with_a_line_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("working") as step:
        for done in range(1, 4):
            step(done, 3, f"part {done}")
    assert "working: 3 of 3 (part 3)" in capsys.readouterr().err
