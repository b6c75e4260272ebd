"""tasks/scores.py: every metric against a case computed by hand, and its standard error."""

import math
import sys

import pytest

from bitloft.errors import OptionError
from bitloft.tasks import scores

# 2 true positives, 1 false positive, 1 false negative, 2 true negatives
WANTED, GIVEN = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]


def test_accuracy_is_a_mean_with_its_error() -> None:
    found = scores.accuracy(WANTED, GIVEN)
    assert found.value == pytest.approx(4 / 6)
    # sample variance of four ones and two zeros: 6/5 * (4/6) * (2/6)
    assert found.stderr == pytest.approx(math.sqrt(6 / 5 * 4 / 6 * 2 / 6 / 6))
    assert (found.name, found.count, found.better) == ("accuracy", 6, "high")
    assert scores.mean("x", [2.0]).stderr is None
    with pytest.raises(OptionError, match="no row to take x of"):
        scores.mean("x", [])


def test_figures_of_a_set_by_hand() -> None:
    assert scores.f1(WANTED, GIVEN).value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores.matthews(WANTED, GIVEN).value == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))
    x, y = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 8.0]
    # sums of products about the means 2.5 and 3.75: 10.5; of squares: 5 and 28.75
    assert scores.pearson(x, y).value == pytest.approx(10.5 / math.sqrt(5 * 28.75))
    # ranks 2 1 3 4: 1 - 6 * 2 / (4 * 15)
    assert scores.spearman(x, y).value == pytest.approx(0.8)


def test_resampled_errors_are_seeded_and_near_the_formula() -> None:
    wanted, given = WANTED * 40, GIVEN * 40
    one, two = scores.f1(wanted, given), scores.f1(wanted, given)
    assert one.stderr == two.stderr
    share = scores.of_set("share", lambda a, b: float((a == b).mean()), wanted, given)
    exact = scores.accuracy(wanted, given).stderr
    assert exact is not None
    assert share.stderr == pytest.approx(exact, rel=0.15)


def test_predictions_of_one_class_are_zero_and_not_an_error() -> None:
    assert scores.matthews([1, 0, 1], [1, 1, 1]).value == 0.0
    assert scores.pearson([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).value == 0.0


@pytest.mark.parametrize(("module", "metric"), [("sklearn", scores.f1), ("scipy", scores.pearson)])
def test_a_metric_without_its_library(monkeypatch: pytest.MonkeyPatch, module: str, metric: object) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError, match=r"install bitloft\[tasks\]"):
        metric(WANTED, GIVEN)  # type: ignore[operator]
