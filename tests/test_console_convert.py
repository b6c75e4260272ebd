"""`bitloft merge` and `bitloft convert` as commands: flags, what they print, one-line errors."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitloft import cli
from bitloft.errors import AdapterError, OptionError
from bitloft.integrations.record import base_record
from bitloft.options import ConvertOptions, MergeOptions
from bitloft.quantize import quantize
from tests.helpers import WORDS, make_adapter

runner = CliRunner()


def run(*arguments: str | Path) -> str:
    result = runner.invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.stdout)


@pytest.mark.parametrize(("name", "options"), [("merge", MergeOptions), ("convert", ConvertOptions)])
def test_every_option_is_a_flag(name: str, options: type) -> None:
    text = runner.invoke(cli.app, [name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for f in fields(options):
        assert "--" + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()[:3]) in text


def test_merge_and_convert_say_what_they_changed(tiny_model: Path, tmp_path: Path) -> None:
    base, words = tmp_path / "base", tmp_path / "words.txt"
    words.write_text(WORDS, encoding="utf-8")
    quantize(tiny_model, base, format="nf4:32", rank=2, steps=1)
    adapter = make_adapter(tmp_path / "a", base=base)
    out = run("merge", base, "--adapter", adapter, "--out", tmp_path / "m", "--data", words, "--length", "64")
    assert "14 matrices; 0 packed ones keep every byte" in out
    assert re.search(r"loss per token .* base, .* with the adapter, .* merged", out)
    assert base_record(tmp_path / "m").fingerprint in out
    out = run("convert", base, "--out", tmp_path / "d", "--dtype", "bfloat16", "--adapter", adapter)
    assert re.search(r"rounding to its dtype changed each matrix by .* on average", out)
    out = run(
        "convert", base, "--to", "portable", "--adapter", adapter, "--source", tiny_model, "--out", tmp_path / "p"
    )
    assert re.search(r"differs from the original by \|W - Q - s0\*B0\*A0\| / \|W\| .* 0\.\d+ on average", out)
    out = run("convert", base, "--to", "bitsandbytes", "--out", tmp_path / "b")
    assert "bitsandbytes has no place for a start" in out


def test_an_adapter_of_no_base_is_let_in_only_when_asked(tiny_model: Path, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", make_adapter(tmp_path / "a")
    quantize(tiny_model, base, format="nf4:32", rank=2, steps=1)
    commands: tuple[tuple[str, list[str]], ...] = (("merge", []), ("convert", ["--to", "dense"]))
    for name, flags in commands:
        with pytest.raises(AdapterError, match="was made without a fingerprint, for 'tiny' by name"):
            run(name, base, *flags, "--adapter", adapter, "--out", tmp_path / "no")
        out = run(name, base, *flags, "--adapter", adapter, "--out", tmp_path / name, "--base-mismatch", "allow")
        assert "without a fingerprint" in out


def test_errors_are_expected_ones(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown to 'gguf'"):
        run("convert", tmp_path, "--out", tmp_path / "o", "--to", "gguf")
