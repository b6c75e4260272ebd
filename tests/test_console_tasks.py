"""console_tasks.py: train, eval and sweep on the command line, by a task's name or by a data file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitloft.cli import app
from bitloft.errors import BitloftError
from bitloft.quantize import quantize
from tests.task_models import sentiment, tiny_bert


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("console")
    quantize(tiny_bert(place / "m", labels=2), place / "base", format="lm4:32", rank=4)
    sentiment(place / "data")
    return place


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_a_task_is_learned_and_measured(place: Path) -> None:
    common = (place / "base", "--task", "sst2", "--data", place / "data", "--length", "32")
    said = run("train", *common, "--out", place / "adapter", "--steps", "2", "--rank", "4", "--limit", "16")
    assert "sst2" in said
    found = json.loads(run("eval", *common, "--adapter", place / "adapter", "--limit", "8", "--json"))
    assert found["rows"] == 8
    assert found["scores"][0]["name"] == "accuracy"
    assert "accuracy" in run("eval", *common)


def test_a_recipe_is_swept(place: Path) -> None:
    recipe = place / "r.toml"
    recipe.write_text(
        f'model = "{place / "m"}"\ntask = "sst2"\ndata = "{place / "data"}"\nlength = 32\n'
        '[train]\nsteps = 1\n[[rows]]\nregime = "lora"\nrank = 2\n'
    )
    found = json.loads(run("sweep", recipe, "--out", place / "sweep", "--json"))
    assert found["cells"] == 1
    assert "report.html" in run("sweep", recipe, "--out", place / "sweep", "--overwrite")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "BASE", "--out", "x"), "from --data FILE or from --task NAME"),
        (("train", "BASE", "--out", "x", "--data", "y.jsonl", "--limit", "3"), "limit is for --task"),
        (("sweep", "r.toml", "--out", "x", "--jobs", "2"), "--jobs is for --engine ray; leave it out"),
        (("sweep", "r.toml", "--out", "x", "--address", "auto"), "--address is for --engine ray; leave it out"),
        (("sweep", "r.toml", "--out", "x", "--engine", "slurm"), "unknown engine 'slurm'; use local or ray"),
        (("eval", "BASE"), "on --data FILE, on --task NAME or by --harness TASKS"),
        (("eval", "BASE", "--task", "sst2", "--harness", "piqa"), "two things to measure"),
        (("eval", "BASE", "--harness", "piqa", "--data", "x.jsonl"), "lm-eval's tasks bring their own"),
        (("eval", "BASE", "--harness", "piqa", "--length", "64"), "length is not for --harness"),
        (("eval", "BASE", "--task", "sst2", "--shots", "2"), "--shots is for --harness; leave it out"),
        (("eval", "BASE", "--data", "x.jsonl", "--harness-tasks", "t"), "--harness-tasks is for --harness"),
    ],
)
def test_one_thing_is_asked(place: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(BitloftError, match=said):
        run(*(place / "base" if word == "BASE" else word for word in words))
