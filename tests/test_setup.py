"""`make setup` without a network: what it asks pip, what it says before CUDA, that it does nothing twice."""

import json
import sys
import time
from pathlib import Path

import pytest
from scripts import bench_smoke, setup

PINS = "numpy==2.4.6\npip==26.3\ntorch==2.13.0\ntriton==3.9.0\n"


class Machine:
    """A machine with or without a GPU and a torch; records the commands that pip was given."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = False
        self.torch: str | None = None
        self.brings: list[str] = []
        self.commands: list[tuple[str, ...]] = []
        venv = root / ".venv"
        (root / "constraints.txt").write_text(PINS)
        (root / "pyproject.toml").write_text('dependencies = ["torch>=2.9,<3"]')
        for name, value in {
            "ROOT": root, "VENV": venv, "PYTHON": venv / "bin" / "python", "STAMP": venv / "stamp",
            "CONSTRAINTS": root / "constraints.txt", "make_venv": self.make_venv, "pip": self.pip,
            "installed_torch": lambda: self.torch, "has_gpu": lambda: self.gpu,
        }.items():  # fmt: skip
            monkeypatch.setattr(setup, name, value)

    def make_venv(self) -> None:
        setup.PYTHON.parent.mkdir(parents=True)
        setup.PYTHON.touch()

    def pip(self, *arguments: str) -> str:
        self.commands.append(arguments)
        if "--dry-run" not in arguments:
            return ""
        names = ["torch", *self.brings]
        return json.dumps({"install": [{"metadata": {"name": name}} for name in names]})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_installs_under_the_constraints_once(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main() == 0
    assert [command[0] for command in machine.commands] == ["install", "install", "install"]
    assert machine.commands[0][-1] == "pip==26.3"
    assert machine.commands[-1][-1].endswith("[dev]")
    assert (setup.VENV / "constraints.txt").read_text() == PINS
    said = capsys.readouterr().out
    machine.commands.clear()
    assert setup.main() == 0
    assert machine.commands == []
    assert capsys.readouterr().out == ""
    assert "CPU" not in said  # pip would bring no CUDA


def test_a_change_of_the_pins_installs_again(machine: Machine) -> None:
    setup.main()
    machine.commands.clear()
    setup.CONSTRAINTS.write_text(PINS + "rich==15.0.0\n")
    setup.main()
    assert machine.commands[-1][-1].endswith("[dev]")


def test_a_change_of_a_native_source_installs_again(machine: Machine) -> None:
    source = setup.ROOT / "src" / "bitloft" / "kernels" / "native" / "pool.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int one;")
    setup.main()
    for file, text in ((source, "int two;"), (setup.ROOT / "CMakeLists.txt", "project(bitloft)")):
        machine.commands.clear()
        file.write_text(text)
        setup.main()
        assert machine.commands[-1][-1].endswith("[dev]")


def test_says_how_to_get_the_cpu_build_before_it_pulls_cuda(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.brings = ["nvidia-cublas", "cuda-toolkit", "sympy", "nvidia-nccl-cu13"]
    seen: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: seen.append(f"{seconds} {len(machine.commands)}"))
    setup.main()
    said = capsys.readouterr().out
    assert "about to install torch with CUDA: 3 packages (cuda-toolkit, nvidia-cublas, nvidia-nccl-cu13, ...)" in said
    assert "https://pytorch.org/get-started/locally" in said
    assert "torch==2.13.0" in said
    assert seen == [f"{setup.PAUSE} 2"]  # after pip itself and the dry run, before anything large


def test_with_a_gpu_nothing_is_asked(machine: Machine) -> None:
    machine.gpu = True
    setup.main()
    assert not [command for command in machine.commands if "--dry-run" in command]


def test_a_torch_that_is_there_is_kept(machine: Machine) -> None:
    machine.torch = "2.14.1+cpu"
    setup.main()
    assert "torch==2.14.1+cpu\n" in (setup.VENV / "constraints.txt").read_text()
    assert not [command for command in machine.commands if "--dry-run" in command]


@pytest.mark.parametrize(
    ("torch", "gpu", "brings", "pinned"),
    [
        (None, False, [], True),
        (None, False, ["nvidia-cublas"], False),
        (None, True, [], False),
        ("2.13.0+cpu", False, [], True),
        ("2.13.0+cu130", False, [], False),
    ],
)
def test_triton_is_pinned_beside_a_cpu_build_only(
    machine: Machine, torch: str | None, gpu: bool, brings: list[str], pinned: bool
) -> None:
    machine.torch, machine.gpu, machine.brings = torch, gpu, brings
    setup.main()
    assert ("triton==3.9.0\n" in (setup.VENV / "constraints.txt").read_text()) is pinned


@pytest.mark.parametrize(
    ("found", "good"),
    [("2.9.0", True), ("2.13.0+cpu", True), ("2.8.9", False), ("3.0.0", False), ("2.13.0a0+git", True)],
)
def test_fits_reads_the_range_of_the_project(found: str, good: bool) -> None:
    assert setup.fits(found) is good


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(setup, "OLDEST", (99, 0))
    assert setup.main() == 2
    said = capsys.readouterr().err
    assert f"Python {sys.version.split()[0]} is too old, transformers needs 99.0 or newer" in said
    assert "make setup PYTHON=python3.12" in said


def test_a_missing_pin_is_named(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    setup.CONSTRAINTS.write_text("torch==2.13.0\n")
    assert setup.main() == 2
    assert "constraints.txt has no line for pip." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stdout", "problem"),
    [
        ("table\n" + json.dumps({"mode": "smoke", "shape": [], "threads": 1}), None),
        (json.dumps({"mode": "smoke"}), "the last line lacks shape, threads"),
        ("1", "the last line of stdout is not a JSON object"),
        ("done", "the last line of stdout is not a JSON object"),
        ("", "the last line of stdout is not a JSON object"),
    ],
)
def test_bench_smoke_reads_the_last_line(stdout: str, problem: str | None) -> None:
    assert bench_smoke.problem_of(stdout) == problem


def test_the_startup_benchmark_runs() -> None:
    assert bench_smoke.run(Path(setup.__file__).parents[1] / "bench" / "startup.py") is None
