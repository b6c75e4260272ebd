"""The work directory of a long run: what is finished is written down, so that a killed run goes on where it stopped.

    OUT.work/journal.jsonl   line 1: what decides the result (source, options, versions, threads); then one line a step
    OUT.work/out/            the directory that becomes OUT

A step is written down, and the line fsynced, only after its bytes are on disk. A line that a kill cut off has no end
and is dropped: its step is done again. The lock on the journal keeps a second process out and ends with its holder.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitloft.checkpoint import publish, sweep
from bitloft.errors import BitloftError, CheckpointError

JOURNAL = "journal.jsonl"
_DAMAGED = "the journal of the interrupted run is damaged; remove its directory to begin anew."


class Journal:
    """Finished steps of a run by name. ``directory`` is where its result grows."""

    def __init__(self, work: Path, handle: int, done: dict[str, dict[str, Any]]) -> None:
        self.directory = work / "out"
        self.done = done
        self._handle = handle

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Write down a finished step; on disk when this returns. Raises OSError where the disk is full."""
        line = json.dumps({"step": name, **record}, sort_keys=True) + "\n"
        os.write(self._handle, line.encode())
        os.fsync(self._handle)
        self.done[name] = dict(record)


def work_directory(out: Path | str) -> Path:
    """Where an unfinished ``out`` is kept: beside it, with ``.work`` at the end of its name."""
    out = Path(out).absolute()
    return out.with_name(out.name + ".work")


def check_free(out: Path | str, *, overwrite: bool, resume: bool) -> None:
    """Raise CheckpointError where ``out`` or an interrupted run of it is in the way of what was asked."""
    out, work = Path(out).absolute(), work_directory(out)
    if work.exists() and not (work / "out").exists():  # a run that was killed after its last rename
        shutil.rmtree(work)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    if (work / "out").exists() and not resume and not overwrite:
        raise CheckpointError(f"{work} holds an interrupted run; resume it, or remove the directory to begin anew.")


@contextmanager
def working(
    out: Path | str,
    identity: Mapping[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
    finish: Callable[[Journal], None] | None = None,
) -> Iterator[Journal]:
    """A journal whose ``directory`` is renamed to ``out`` on success, or given to ``finish``, which takes it elsewhere.

    After any failure (a full disk, a kill, a damaged tensor) the finished steps stay in ``work_directory(out)`` for a
    run with ``resume`` and the same ``identity``; where none was finished nothing stays. Raises CheckpointError where
    ``out`` exists (without ``overwrite``), or where an interrupted run is in the way (without ``resume``), was begun
    with another identity or is still running.
    """
    check_free(out, overwrite=overwrite, resume=resume)
    out, work = Path(out).absolute(), work_directory(out)
    handle, done, ours = None, dict[str, dict[str, Any]](), True
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out)
        handle, done = _open(work, identity, resume=resume)
        journal = Journal(work, handle, done)
        yield journal
        if finish is None:
            publish(journal.directory, out)
        else:
            finish(journal)
        shutil.rmtree(work)
        done.clear()
    except OSError as error:
        kept = f"what is finished stays in {work}: free some space and resume" if done else "nothing was left there"
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}; {kept}.") from error
    except _RefusedError:
        ours = False
        raise
    except BitloftError as error:
        if not done:
            raise
        raise type(error)(f"{error} What is finished stays in {work}.") from error
    finally:
        if handle is not None:
            os.close(handle)
        if ours and not done:
            shutil.rmtree(work, ignore_errors=True)


class _RefusedError(CheckpointError):
    """The work directory belongs to another run: it must stay as it is."""


def _open(work: Path, identity: Mapping[str, Any], *, resume: bool) -> tuple[int, dict[str, dict[str, Any]]]:
    """The journal's handle, locked, and what it says is done; without ``resume`` a new one."""
    journal = work / JOURNAL
    resuming = resume and journal.exists() and (work / "out").exists()
    (work / "out").mkdir(parents=True, exist_ok=True)
    handle = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise _RefusedError(f"another process is working in {work}; wait for it or end it.") from error
    try:
        lines = _complete_lines(handle) if resuming else []
        if lines:
            _agree(work, lines[0], identity)
            return handle, {line.pop("step"): line for line in lines[1:]}
        shutil.rmtree(work / "out")
        (work / "out").mkdir()
        os.ftruncate(handle, 0)
        os.write(handle, (json.dumps(identity, sort_keys=True) + "\n").encode())
        os.fsync(handle)
    except BaseException:
        os.close(handle)
        raise
    return handle, {}


def _complete_lines(handle: int) -> list[dict[str, Any]]:
    """The journal's objects; an unfinished last line is cut off the file."""
    data = bytearray()
    while chunk := os.pread(handle, 1 << 20, len(data)):
        data += chunk
    whole = data.rfind(b"\n") + 1
    os.ftruncate(handle, whole)
    try:
        lines = [json.loads(line) for line in data[:whole].splitlines()]
    except ValueError as error:
        raise _RefusedError(_DAMAGED) from error
    if not all(isinstance(line, dict) and (i == 0 or "step" in line) for i, line in enumerate(lines)):
        raise _RefusedError(_DAMAGED)
    return lines


def _agree(work: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise _RefusedError(
                f"the interrupted run in {work} had {key} {found.get(key)!r}, now it is {wanted.get(key)!r}; resume "
                "with the same settings, or remove the directory to begin anew."
            )
