"""judge.py: code runs only where that was allowed, several answers give pass@k; more in test_tune.py."""

from pathlib import Path

from bitloft.judge import judge
from tests.helpers import write_rows


def test_code_runs_in_the_sandbox_where_it_is_allowed(tiny_model: Path, tmp_path: Path) -> None:
    row: dict[str, object] = {"prompt": "def f():\n", "canonical_solution": "    return 1", "entry_point": "f"}
    file = write_rows(tmp_path / "rows.jsonl", [row | {"test": "def check(f): assert f() == 1"}])
    found = judge(tiny_model, "humaneval", file, samples=2, allow_code_execution=True, length=200)
    assert [score.name for score in found.scores] == ["pass@1", "loss"]
    assert found.scores[0].value == 0.0  # a random model
    assert found.sandbox is not None
    assert "network" in found.sandbox
    alone = judge(tiny_model, "humaneval", file, generates=False, length=200)
    assert alone.sandbox is None
    assert alone.value("loss") == found.value("loss")
