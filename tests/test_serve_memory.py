"""Free memory: a number that fits this machine, and a control group's limit where there is one."""

import os
from pathlib import Path

import pytest

from bitloft.serve import memory


def test_no_more_than_there_is() -> None:
    assert 0 < memory.free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, use = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "LIMITS", (str(limit),))
    monkeypatch.setattr(memory, "USES", (str(use),))
    whole = memory.free_memory()
    limit.write_text("5000000\n", encoding="utf-8")
    use.write_text("2000000\n", encoding="utf-8")
    assert memory.free_memory() == 3_000_000 < whole
    limit.write_text("max\n", encoding="utf-8")
    assert memory.free_memory() > 3_000_000
