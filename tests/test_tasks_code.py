"""tasks/code.py: pass@k by hand, programs made of answers; they run in the sandbox only."""

import pytest

from bitloft.errors import OptionError
from bitloft.tasks.code import TASKS, pass_at_k, program
from tests.helpers import shared

ROW = {
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
    "canonical_solution": "    return a + b\n",
}


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)  # C(3,2) / C(4,2)
    assert pass_at_k(3, 3, 2) == 1.0
    assert pass_at_k(10, 0, 10) == 0.0
    with pytest.raises(OptionError, match=r"pass@3 of 2 answers"):
        pass_at_k(2, 1, 3)


def test_an_answer_is_a_body_or_a_fence() -> None:
    assert program("    return 1", "def f():\n") == "def f():\n    return 1"
    assert program("Sure:\n```python\ndef f(): pass\n```\nDone.", "x") == "def f(): pass\n"
    assert program("```\nf = 1\n```", "x") == "f = 1\n"


def test_right_and_wrong_answers_are_told_apart() -> None:
    answers = [
        ["    return a + b\n", "    return a - b\n"],
        ["```python\ndef add(a, b): return b + a\n```", "    retur"],
    ]
    (score,) = TASKS["humaneval"].scores([ROW, ROW], answers)
    assert score.name == "pass@1"
    assert score.value == 0.5
    mbpp = {"prompt": "add", "test_imports": ["import math"], "test_list": ["assert f(2) == 3"], "code": ""}
    (score,) = TASKS["mbpp"].scores([mbpp], [["def f(x):\n    return x + 1"]])
    assert score.value == 1.0


def test_solutions_of_real_problems_pass() -> None:
    rows = TASKS["humaneval"].rows(shared("data/humaneval"), "test", 2)
    assert TASKS["humaneval"].scores(rows, [[row["canonical_solution"]] for row in rows])[0].value == 1.0
    rows = TASKS["mbpp"].rows(shared("data/mbpp"), "test", 2)
    assert TASKS["mbpp"].scores(rows, [[row["code"]] for row in rows])[0].value == 1.0
    assert rows[0]["test_list"][0] in TASKS["mbpp"].prompt(rows[0])
