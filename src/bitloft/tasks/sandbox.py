"""A program in a process of its own: limits on time, memory and file size, no network where the kernel lets us.

    time       wall clock (killed with its whole group) and CPU seconds
    memory     address space
    files      it may write 1 MB files in a directory that is removed
    network    a namespace of its own (``unshare``), without an interface; where the kernel refuses that, Result says so

This keeps a mistaken program from harming the machine; it is no wall against a hostile one, which wants a container or
a virtual machine around the whole run. The program gets an empty environment, no input and isolated Python (-I).
"""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

SECONDS, MEMORY = 10.0, 512 << 20
_WRITTEN = 1 << 20


@dataclass(frozen=True)
class Result:
    """``ended`` is "passed", "failed" (with the last line of its error), "timeout" or "killed"; ``isolated`` where the
    network was off."""

    ended: str
    message: str
    isolated: bool

    @property
    def passed(self) -> bool:
        return self.ended == "passed"


@functools.cache
def network_off() -> tuple[str, ...]:
    """The command that takes the network away, empty where this machine does not let us."""
    tool = shutil.which("unshare")
    if tool is None:
        return ()
    command = (tool, "--user", "--map-root-user", "--net")
    tried = subprocess.run([*command, "true"], capture_output=True, check=False, timeout=10)
    return command if tried.returncode == 0 else ()


def run(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Result:
    """Run a Python program to its end. It passed where it ended with 0; it never raises for what the program does."""

    def limit() -> None:  # in the child, before it becomes Python
        for kind, most in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, int(seconds) + 1),
            (resource.RLIMIT_FSIZE, _WRITTEN),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))

    with (
        tempfile.TemporaryDirectory() as place,
        tempfile.NamedTemporaryFile(suffix=".py") as file,
        tempfile.TemporaryFile() as errors,
    ):
        file.write(program.encode("utf-8", "replace"))
        file.flush()
        command = [*network_off(), sys.executable, "-I", file.name]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,  # a file, not a pipe: it is bounded, and no child of the program holds it open
            cwd=place,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return Result("timeout", f"still running after {seconds:g} s", bool(network_off()))
        _end(process)  # what it may have left behind in its group
        errors.seek(0)
        said = errors.read(_WRITTEN)
    lines = said.decode("utf-8", "replace").strip().splitlines()
    ended = "passed" if process.returncode == 0 else "killed" if process.returncode < 0 else "failed"
    return Result(ended, lines[-1] if lines else "", bool(network_off()))


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        process.wait()
