"""The command line: flags from dataclasses, one-line errors with exit code 2, and the whole life on a tiny model."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitloft import __version__, cli, console, console_adapter, console_serve, console_tasks
from bitloft.adapters import read_packed
from bitloft.options import CompressOptions, QuantizeOptions, TrainOptions
from tests.helpers import make_adapter, write_rows

runner = CliRunner()


def run(*arguments: str | Path) -> str:
    """Run a command in this process; fails with its output unless it succeeds."""
    result = runner.invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    """Run the real program; returns stderr, which must be one line, after exit code 2."""
    code = [sys.executable, "-m", "bitloft.cli", *(str(a) for a in arguments)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("bitloft: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("name", "options"), [("quantize", QuantizeOptions), ("train", TrainOptions), ("compress", CompressOptions)]
)
def test_every_option_is_a_flag_with_its_help(name: str, options: type) -> None:
    help_text = runner.invoke(cli.app, [name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for f in fields(options):
        assert "--" + f.name.replace("_", "-") in help_text
        assert " ".join(f.metadata["help"].split()[:3]) in help_text


def test_a_directory_of_adapters_is_packed_with_a_row_each(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_adapter(tmp_path / "in" / name, rank=8)
    (tmp_path / "in" / "two" / "adapter_model.safetensors").write_bytes(b"junk")
    arguments = ["compress", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--bits", "4", "--no-refine"]
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "1 packed, 0 kept, 1 failed" in result.stdout
    wanted = {"name": "waterfill", "bits": 4.0, "refine": False, "code": "trellis"}
    assert read_packed(tmp_path / "out" / "one").method == wanted
    make_adapter(tmp_path / "in" / "two", rank=8)
    assert "1 packed, 1 kept, 0 failed" in run(*arguments)
    assert "needs a directory of adapters" in refused("compress", tmp_path / "in" / "one", "--out", "x", "--jobs", "2")
    assert "is for one adapter" in refused(*arguments, "--overwrite")


def test_the_commands_are_these() -> None:
    wanted = {"quantize", "train", "compress", "expand", "eval", "generate", "serve", "bench-serve", "inspect", "info"}
    assert wanted <= set(console.COMMANDS | console_adapter.COMMANDS | console_serve.COMMANDS | console_tasks.COMMANDS)
    assert run("--version").strip() == __version__


def test_the_whole_life(tiny_model: Path, tmp_path: Path) -> None:
    base, adapter, packed, plain = (tmp_path / n for n in ("base", "adapter", "packed", "plain"))
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "the quick brown fox jumps over the lazy dog"}] * 8)
    out = run("quantize", tiny_model, "--out", base, "--format", "lm4:64", "--rank", "4", "--skip", "layers.1.mlp.*")
    assert "true bits" in out
    assert "matches skip" in out
    out = run("train", base, "--data", data, "--out", adapter, "--steps", "3", "--rank", "4", "--length", "64")
    assert "in 3 steps" in out
    assert "true bits" in run("compress", adapter, "--out", packed, "--bits", "4", "--base", base)
    run("expand", packed, "--out", plain)
    assert {p.name for p in plain.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    choices: list[list[str | Path]] = [[], ["--adapter", adapter], ["--adapter", packed]]
    for given in choices:
        report = json.loads(run("eval", base, "--data", data, "--length", "64", "--json", *given))
        assert report["perplexity"] > 1
    assert "perplexity" in run("eval", base, "--data", data, "--length", "64")
    out = run("generate", base, "--prompt", "the quick", "--adapter", f"a={packed}", "--max-tokens", "3")
    assert out.startswith("[a] the quick\n")
    for path, kind in ((base, "base"), (adapter, "adapter"), (packed, "packed adapter")):
        found = json.loads(run("inspect", path, "--json"))
        assert found["kind"] == kind
        assert found["rows"]
        assert kind in run("inspect", path)


def test_info_says_which_kernels_run_and_why() -> None:
    out = run("info")
    assert "kernels" in out
    assert "torch" in out


def test_errors_are_one_line(tiny_model: Path, tmp_path: Path) -> None:
    assert "no nf code of 5 bits" in refused("quantize", tiny_model, "--out", tmp_path / "o", "--format", "nf5:64")
    assert "does not exist" in refused("quantize", tmp_path / "none", "--out", tmp_path / "o")
    assert "is no base and no adapter" in refused("inspect", tmp_path)
    assert not (tmp_path / "o").exists()


def test_unknown_flags_are_errors() -> None:
    assert runner.invoke(cli.app, ["quantize", "m", "--out", "o", "--bits", "2"]).exit_code == 2
