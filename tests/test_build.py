"""The build: with a compiler the library is made beside cpu.py or into the wheel, without one the package installs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
needs_backend = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import scikit_build_core"], capture_output=True).returncode != 0,
    reason="no scikit-build-core outside of pip's own build environment",
)


@needs_cmake
def test_without_a_working_compiler_nothing_is_built_and_nothing_fails(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/bin/false", "CMAKE_GENERATOR": "Unix Makefiles"}
    configured = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path], capture_output=True, text=True, env=environment, check=True
    )
    assert "no working C++ compiler; the package is installed without native kernels" in " ".join(
        configured.stderr.split()
    )
    subprocess.run(["cmake", "--install", tmp_path, "--prefix", tmp_path / "out"], capture_output=True, check=True)
    assert not list(tmp_path.rglob("_native*"))


def wheel(folder: Path, source: Path, **environment: str) -> list[str]:
    """The names in a wheel that is built from ``source``."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    (found,) = folder.glob("bitloft-*.whl")
    return zipfile.ZipFile(found).namelist()


@pytest.mark.slow
@needs_backend
def test_wheels_with_and_without_a_compiler_and_from_an_sdist(tmp_path: Path) -> None:
    """The sources are copied: building leaves nothing in the repository."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree = tmp_path / "tree"
    for name in filter(None, files.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    bare = wheel(tmp_path / "bare", tree, CXX="/bin/false")
    assert "bitloft/kernels/cpu.py" in bare
    assert "bitloft/kernels/_native.so" not in bare
    shutil.rmtree(tree / "build", ignore_errors=True)
    make = "from scikit_build_core.build import build_sdist; print(build_sdist('out'))"
    done = subprocess.run([sys.executable, "-c", make], cwd=tree, capture_output=True, text=True, check=True)
    full = wheel(tmp_path / "full", tree / "out" / done.stdout.splitlines()[-1])
    assert "bitloft/kernels/_native.so" in full
    assert not [name for name in full if name.endswith((".cpp", ".hpp"))]
