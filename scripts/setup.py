"""`make setup`: a virtual environment in .venv with bitloft and the developers' tools, as constraints.txt pins them.

Standard library only, and quick when there is nothing to do: a stamp in .venv holds the hash of what was installed.

* A torch that fits pyproject.toml and is already there is used, not pulled again: one inside .venv, or one in the
  environment of the Python that runs this script (its packages are put behind .venv's own on the path).
* On a machine without a GPU it asks pip, before anything large is pulled, whether torch would bring CUDA with it,
  and says how to get the CPU build.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bitloft-setup.stamp"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = (3, 11)
PAUSE = 10  # seconds in which a person can stop a CUDA download

CPU_ADVICE = """\
This machine shows no GPU, but pip is about to install torch with CUDA: {count} packages ({sample}, ...), gigabytes.
For the CPU build: stop here, open https://pytorch.org/get-started/locally, choose "Pip" and "CPU", run the command it
shows with `{pip}` in place of pip and `torch=={torch}` in place of its package names, then `make setup` again:
it keeps the torch that it finds."""


class SetupError(Exception):
    """What the user can mend, in one sentence."""


def main() -> int:
    try:
        setup()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"setup: `{' '.join(map(str, error.cmd))}` ended with {error.returncode}; see above.", file=sys.stderr)
        return 2
    return 0


def setup() -> None:
    if sys.version_info < OLDEST:
        raise SetupError(
            f"Python {sys.version.split()[0]} is too old, transformers needs {OLDEST[0]}.{OLDEST[1]} or newer; "
            "name one with `make setup PYTHON=python3.12`."
        )
    wanted = fingerprint()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return
    started = time.monotonic()
    if not PYTHON.exists():
        make_venv()
    STAMP.unlink(missing_ok=True)
    found = installed_torch()
    constraints = constrain(found, plain=found is not None and "+cpu" in found and not has_gpu())
    pip("install", "--quiet", pin(constraints, "pip"))
    if found is None and not has_gpu() and not warn_of_cuda(pin(constraints, "torch")):
        constrain(found, plain=True)
    say("installing bitloft and the developers' tools (the first time takes a minute or more)")
    pip("install", "--quiet", "-e", f"{ROOT}[dev]")
    STAMP.write_text(wanted)
    say(f"done in {time.monotonic() - started:.0f} s: torch {installed_torch()}, {PYTHON.relative_to(ROOT)}")


def fingerprint() -> str:
    """Hash of everything that decides what .venv holds."""
    native = (*ROOT.glob("CMakeLists.txt"), *sorted(ROOT.glob("src/bitloft/kernels/native/*")))
    files = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__), *native)
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def make_venv() -> None:
    """Make .venv; where this Python's own environment has a torch that fits, let .venv see its packages."""
    say(f"making .venv with Python {sys.version.split()[0]}")
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    try:
        found, site = version("torch"), Path(str(distribution("torch").locate_file(""))).resolve()
    except PackageNotFoundError:
        return
    if fits(found):
        say(f"using torch {found} from {site}")
        # a .pth line, not --system-site-packages: that would skip a virtual environment and see only its parent Python
        inner = next((VENV / "lib").glob("python*/site-packages"))
        (inner / "outer-environment.pth").write_text(f"{site}\n")


def fits(found: str) -> bool:
    """Whether torch ``found`` lies in the range that pyproject.toml gives."""
    span = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    if span is None:
        raise SetupError("pyproject.toml no longer spells its torch requirement as torch>=A,<B; mend scripts/setup.py.")
    return numbers(span[1]) <= numbers(found) < numbers(span[2])


def numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of 2.13.0+cpu; what follows the release number is left out."""
    return tuple(int(n) for n in re.match(r"[\d.]*\d", text)[0].split("."))  # type: ignore[index]


def installed_torch() -> str | None:
    """Version of the torch that .venv's Python sees, if it fits; the import itself would take seconds."""
    ask = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([str(PYTHON), "-c", ask], capture_output=True, text=True)
    found = done.stdout.strip()
    return found if done.returncode == 0 and fits(found) else None


def constrain(torch: str | None, *, plain: bool) -> str:
    """Write .venv's constraints, with torch's line set to the version that is there, if one is.

    Builds of torch for GPUs name a triton of their own, so its line stays for ``plain`` ones only.
    """
    constraints = CONSTRAINTS.read_text()
    if not plain:
        constraints = re.sub(r"(?m)^triton==.*\n", "", constraints)
    constraints = re.sub(r"(?m)^torch==.*$", f"torch=={torch}", constraints) if torch else constraints
    (VENV / "constraints.txt").write_text(constraints)
    return constraints


def pin(constraints: str, package: str) -> str:
    """The line of ``package``, such as torch==2.13.0."""
    line = re.search(rf"(?m)^{package}==\S+$", constraints)
    if line is None:
        raise SetupError(f"constraints.txt has no line for {package}.")
    return line[0]


def pip(*arguments: str) -> str:
    """Run .venv's pip under the constraints; what it prints on stdout."""
    limits = ["-c", str(VENV / "constraints.txt")] if arguments[0] == "install" else []
    command = [str(PYTHON), "-m", "pip", *arguments, *limits, "--disable-pip-version-check"]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def has_gpu() -> bool:
    """Whether an accelerator that torch has its own build for is visible: NVIDIA's or AMD's device files or tools."""
    devices = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"), Path("/dev/kfd"))
    return sys.platform == "darwin" or bool(shutil.which("nvidia-smi")) or any(device.exists() for device in devices)


def warn_of_cuda(torch: str) -> bool:
    """Whether pip would bring CUDA; then say how to get the CPU build. For this pip reads metadata only."""
    report = json.loads(pip("install", "--dry-run", "--quiet", "--report", "-", torch))
    cuda = cuda_packages(report)
    if not cuda:
        return False
    release = torch.partition("==")[2]
    print(
        CPU_ADVICE.format(count=len(cuda), sample=", ".join(cuda[:3]), pip=".venv/bin/pip", torch=release), flush=True
    )
    if sys.stdin.isatty():
        say(f"going on with CUDA in {PAUSE} s; Ctrl-C stops")
        time.sleep(PAUSE)
    return True


def cuda_packages(report: dict[str, Any]) -> list[str]:
    """Names in pip's installation report that belong to CUDA."""
    names = sorted(item["metadata"]["name"].lower() for item in report["install"])
    return [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
