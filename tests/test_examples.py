"""Every example runs, and so does the Python on the README's first screen."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import bitloft
from bitloft.integrations.record import load_tokenizer
from tests.helpers import WORDS, write_rows

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("*.py"))
BITS = "8.0"  # a toy adapter's names and config alone take more than the 0.8 of the text


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    messages = [{"role": "user", "content": "what is packed ?"}, {"role": "assistant", "content": "an adapter is ."}]
    return write_rows(tmp_path / "rows.jsonl", [{"text": WORDS}, {"messages": messages}])


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def test_all_examples_are_tested_here() -> None:
    assert EXAMPLES == ["quickstart", "transformers_peft"]


def test_quickstart(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("quickstart", tiny_model, rows, tmp_path / "out", BITS, monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    stored = re.search(r"packed: ([\d,]+) bytes", said)
    assert stored
    assert int(stored[1].replace(",", "")) == sum(f.stat().st_size for f in (tmp_path / "out" / "packed").iterdir())
    assert re.search(r"mine: .*\nbase: ", said)


def test_transformers_peft(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bitloft.quantize(tiny_model, tmp_path / "base", format="lm4:64", rank=4)
    run("transformers_peft", tmp_path / "base", tmp_path / "adapter", monkeypatch=monkeypatch)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]


def test_the_readme_code_runs(tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"(?s)```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert code
    assert len(code[1].strip().splitlines()) == 8
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))  # the code takes the default length
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    (tmp_path / "held-out.jsonl").symlink_to(rows)
    monkeypatch.chdir(tmp_path)
    batch = load_tokenizer(tiny_model)(["the quick", "the quick"], return_tensors="pt")
    names: dict[str, Any] = {"batch": {**batch, "max_new_tokens": 2}}
    exec(compile(code[1].replace("bits=0.8", f"bits={BITS}"), "README.md", "exec"), names)
    assert names["packed"].true_bits < float(BITS)
