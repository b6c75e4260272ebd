"""`bitloft serve` and `bitloft bench-serve` as commands."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitloft import cli
from bitloft.errors import OptionError
from bitloft.options import LoadOptions, ServeOptions
from bitloft.serve.load import Report
from tests.serving import World

runner = CliRunner()


@pytest.mark.parametrize(("name", "options"), [("serve", ServeOptions), ("bench-serve", LoadOptions)])
def test_every_option_is_a_flag(name: str, options: type) -> None:
    text = runner.invoke(cli.app, [name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for f in fields(options):
        assert "--" + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()[:3]) in text


def test_serve_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("bitloft.serve.http.serve", lambda *given: seen.append(given))
    assert runner.invoke(cli.app, ["serve", "b", "--adapter-dir", "a", "--no-page", "--port", "0"]).exit_code == 0
    ((base, directory, options),) = seen
    assert (base, directory) == (Path("b"), Path("a"))
    assert (options.page, options.port, options.admin) == (False, 0, False)


def bench(world: World, *flags: str) -> tuple[int, str, dict[str, Any]]:
    arguments = ["bench-serve", world.url, "--requests", "8", "--words", "4", "--max-tokens", "3", *flags]
    found = runner.invoke(cli.app, arguments, catch_exceptions=False, env={"COLUMNS": "300"})
    *_, last = found.stdout.strip().splitlines()
    return found.exit_code, re.sub(r"\s+", " ", found.stdout), json.loads(last)


def test_bench_serve_prints_a_table_and_json(world: World, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\n\nthe quick brown fox\n", encoding="utf-8")
    code, text, data = bench(world, "--prompt-file", str(prompts), "--rate", "100")
    assert code == 0
    assert set(data) == {f.name for f in fields(Report)}
    assert (data["answered"], data["wrong_answers"]) == (8, 0)
    assert "8 checked against the same request asked alone, 0 wrong" in text
    assert "generator was late" in text
    assert "not checked" in bench(world, "--no-check")[1]


def test_a_wrong_answer_is_an_exit_code(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(target: Any, jobs: Any, *rest: Any) -> Any:
        return {(job.model, job.prompt): "never said" for job in jobs}

    monkeypatch.setattr("bitloft.serve.load.references", wrong)
    code, text, data = bench(world)
    assert (code, data["wrong_answers"]) == (1, 8)
    assert "instead of 'never said'" in text


@pytest.mark.parametrize(("content", "words"), [(None, "cannot read prompts"), ("\n \n", "holds no prompt")])
def test_prompt_files_that_are_none(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match=words):
        runner.invoke(cli.app, ["bench-serve", "x", "--prompt-file", str(file)], catch_exceptions=False)
