"""`bitloft plan` on a terminal."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitloft.cli import app
from bitloft.machine import write_machine
from tests.test_plan import machine

FLAGS = ["--format", "lm2:64", "--rank", "4", "--adapter-rank", "4", "--adapters", "500", "--played", "2000"]


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_plan_prints_stages_and_traffic(tiny_model: Path, tmp_path: Path) -> None:
    out = run("plan", tiny_model, *FLAGS)
    assert "no times, no replicas" in out
    assert "not measured" in out
    write_machine(tmp_path / "m.toml", machine())
    out = run("plan", tiny_model, *FLAGS, "--machine", tmp_path / "m.toml", "--html", tmp_path / "p.html")
    for words in ("hit rate", "replicas", "busiest replica", "p99 ", "request by request"):
        assert words in out
    assert "Hit rate" in (tmp_path / "p.html").read_text()
    found = json.loads(run("plan", tiny_model, *FLAGS, "--json"))
    assert found["footprint"]["name"] == tiny_model.name


def test_measuring_needs_a_file(tiny_model: Path) -> None:
    with pytest.raises(Exception, match="name it"):
        run("plan", tiny_model, "--measure")
