"""tasks/sandbox.py: a program is stopped by time, memory and file size, and reaches no network where that can be."""

import time

import pytest

from bitloft.tasks import sandbox


def test_ends_are_told_apart() -> None:
    assert sandbox.run("x = 1").passed
    wrong = sandbox.run("assert 1 == 2, 'no'")
    assert (wrong.ended, wrong.message) == ("failed", "AssertionError: no")
    assert not wrong.passed
    assert sandbox.run("x = 1\0").ended == "failed"


def test_an_endless_program_and_its_children_are_killed() -> None:
    began = time.monotonic()
    found = sandbox.run("import os\nos.fork()\nwhile True: pass", seconds=1.5)
    assert found.ended == "timeout"
    assert time.monotonic() - began < 30


def test_memory_and_files_are_bounded() -> None:
    assert sandbox.run("x = bytearray(1 << 30)", memory=256 << 20).message == "MemoryError"
    found = sandbox.run("open('big', 'wb').write(bytes(1 << 22))")
    assert found.ended != "passed"


def test_nothing_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert sandbox.run("import os\nassert 'SECRET' not in os.environ\nassert os.listdir('.') == []").passed
    assert sandbox.run("import sys\nassert sys.stdin.read() == ''").passed


def test_no_network_where_the_kernel_lets_us() -> None:
    code = """
import errno, socket
s = socket.socket()
s.settimeout(1)
try:
    s.connect(('127.0.0.1', 9))
except OSError as e:
    assert e.errno == errno.ENETUNREACH, e
"""
    found = sandbox.run(code)
    assert found.isolated == bool(sandbox.network_off())
    if found.isolated:
        assert found.passed, found.message


def test_without_unshare_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    sandbox.network_off.cache_clear()
    try:
        assert sandbox.run("pass") == sandbox.Result("passed", "", False)
    finally:
        sandbox.network_off.cache_clear()
