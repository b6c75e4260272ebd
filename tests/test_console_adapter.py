"""`bitloft compress`, `rebase` and `expand` on the command line: flags, what they print, what they refuse."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitloft import cli
from bitloft.errors import AdapterError, OptionError
from bitloft.options import CompressOptions, RebaseOptions
from bitloft.quantize import quantize
from tests.helpers import make_adapter, write_rows

runner = CliRunner()


def run(*arguments: str | Path) -> str:
    result = runner.invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.stdout)


@pytest.mark.parametrize(("name", "options"), [("compress", CompressOptions), ("rebase", RebaseOptions)])
def test_every_option_is_a_flag_with_its_help(name: str, options: type) -> None:
    text = runner.invoke(cli.app, [name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for f in fields(options):
        assert "--" + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()[:3]) in text


def test_distill_measure_and_rebase_say_what_they_found(tiny_model: Path, tmp_path: Path) -> None:
    for bits in ("2", "4"):
        quantize(tiny_model, tmp_path / bits, format=f"lm{bits}:64", rank=0, solver="qlora")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the quick brown fox jumps over the lazy dog"}] * 8)
    adapter = make_adapter(tmp_path / "a", rank=8, scale=1.0, base=tmp_path / "4")
    out = run(
        *("compress", adapter, "--out", tmp_path / "p", "--bits", "3", "--base", tmp_path / "4", "--data", rows),
        *("--distill", "3", "--length", "32"),
    )
    assert re.search(
        r"distilled .* 3 steps on scales and codes: held-out loss \d\.\d{5} -> \d\.\d{5} \(\d\.\d+ as", out
    )
    assert "it was" not in out
    with pytest.raises(AdapterError, match="was trained for another base"):
        run("eval", tmp_path / "2", "--data", rows, "--length", "32", "--adapter", adapter)
    out = run(
        *("compress", adapter, "--out", tmp_path / "q", "--bits", "3", "--base", tmp_path / "2"),
        *("--from", tmp_path / "4", "--base-mismatch", "measure"),
    )
    assert re.search(r"it was .* on this base \(2 bit\) it changes the loss by .*, on its own by [+-]\d", out)
    out = run(
        "eval", tmp_path / "2", "--data", rows, "--length", "32", "--adapter", adapter, "--base-mismatch", "allow"
    )
    assert re.search(r"adapter was .* losses given here are those on this base", out)
    out = run(
        *("rebase", adapter, "--to", tmp_path / "2", "--data", rows, "--out", tmp_path / "r", "--steps", "3"),
        *("--length", "32", "--from", tmp_path / "4"),
    )
    assert re.search(r"held-out loss .* \d\.\d{5} -> \d\.\d{5} in 3 steps", out)
    assert re.search(r"memory .* of models held whole", out)
    assert "expanded" in run("expand", tmp_path / "p", "--out", tmp_path / "expanded")


def test_one_adapter_s_flags_are_refused_for_many(tmp_path: Path) -> None:
    make_adapter(tmp_path / "in" / "one")
    for flags, words in ((["--from", "x"], "--from is for one adapter"), (["--overwrite"], "--overwrite is for one")):
        with pytest.raises(OptionError, match=words):
            run("compress", tmp_path / "in", "--out", tmp_path / "out", *flags)
    with pytest.raises(OptionError, match="needs a directory of adapters"):
        run("compress", tmp_path / "in" / "one", "--out", tmp_path / "out", "--jobs", "2")
