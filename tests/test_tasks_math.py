"""tasks/math.py: what is read off an answer, and equality as mathematics."""

import sys

import pytest

from bitloft.errors import OptionError
from bitloft.tasks.math import TASKS, boxed, equal, final_number
from tests.helpers import shared


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so she makes $1,234.50 a day.\n#### 18", "18"),
        ("#### -1,080 dollars", "-1080"),
        ("first 3, then 5 apples.", "5"),
        ("it costs $3.", "3"),
        ("nothing", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_boxes_close() -> None:
    assert boxed(r"so \boxed{\frac{1}{2}} and then \boxed{x^{2}}.") == "x^{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1/2", "0.5", True),
        ("18", "18.0", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("x+1", "1+x", True),
        (r"\frac{2}{4}", r"\frac12", True),
        ("17", "18", False),
        ("x", "y", False),
        (r"\text{nonsense", "3", False),
    ],
)
def test_equal_as_mathematics(given: str, wanted: str, same: bool) -> None:
    assert equal(given, wanted) is same


def test_scores_by_hand() -> None:
    rows = [{"question": "", "answer": "#### 18"}, {"question": "", "answer": "#### 1,000"}, {"answer": "#### 3"}]
    (score,) = TASKS["gsm8k"].scores(rows, [["it is 18"], ["#### 1000.0"], ["four"]])
    assert score.value == pytest.approx(2 / 3)
    rows = [{"solution": r"\boxed{\frac{1}{2}}"}, {"solution": r"\boxed{3}"}]
    (score,) = TASKS["math"].scores(rows, [[r"hence \boxed{0.5}"], ["so 4"]])
    assert score.value == 0.5


def test_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert equal("3", "3")  # the same text needs none
    with pytest.raises(OptionError, match="needs math-verify"):
        equal("3", "4")


def test_references_of_real_rows_are_right() -> None:
    rows = TASKS["gsm8k"].rows(shared("data/gsm8k"), "test", 50)
    assert TASKS["gsm8k"].scores(rows, [[row["answer"]] for row in rows])[0].value == 1.0
    rows = TASKS["math"].rows(shared("data/math"), "test", 30)
    assert TASKS["math"].scores(rows, [[row["solution"]] for row in rows])[0].value == 1.0
