"""Metrics with their standard errors: means over rows, and scikit-learn's and scipy's figures of a whole set.

    a mean over m rows       se = s / sqrt(m), s the rows' standard deviation
    a figure of the set      se = the standard deviation of it over bootstrap resamples of the rows (Efron 1979)

F1, Matthews and correlations are no means over rows, so they are resampled; 200 resamples leave the error itself known
to 5 %. Seeded: the same predictions have the same error.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitloft.errors import OptionError

RESAMPLES = 200


@dataclass(frozen=True)
class Score:
    """One figure: ``value`` in the metric's own unit (shares from 0 to 1), ``stderr`` None where one row has none.

    ``better`` is "high" or "low".
    """

    name: str
    value: float
    stderr: float | None
    count: int
    better: str = "high"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean(name: str, values: Sequence[float | int], better: str = "high") -> Score:
    """The mean of a figure that every row has. Raises OptionError where there is no row."""
    if not len(values):
        raise OptionError(f"there is no row to take {name} of.")
    found = np.asarray(values, dtype=np.float64)
    stderr = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Score(name, float(found.mean()), stderr, len(found), better)


def of_set(
    name: str,
    figure: Callable[[Any, Any], float],
    wanted: Sequence[float | int],
    given: Sequence[float | int],
    seed: int = 0,
) -> Score:
    """``figure(wanted, given)`` of the whole set, its error by resampling rows."""
    true, found = np.asarray(wanted), np.asarray(given)
    draw = np.random.default_rng(seed)
    resampled = []
    with warnings.catch_warnings():  # a resample may hold one class only, where the figure is its lowest or undefined
        warnings.simplefilter("ignore")
        value = figure(true, found)
        for _ in range(RESAMPLES if len(true) > 1 else 0):
            chosen = draw.integers(0, len(true), len(true))
            resampled.append(figure(true[chosen], found[chosen]))
    known = [x for x in resampled if math.isfinite(x)]
    stderr = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Score(name, float(value) if math.isfinite(value) else 0.0, stderr, len(true))


def accuracy(wanted: Sequence[float | int], given: Sequence[float | int]) -> Score:
    """The share of rows whose prediction is the label."""
    return mean("accuracy", [float(a == b) for a, b in zip(wanted, given, strict=True)])


def f1(wanted: Sequence[float | int], given: Sequence[float | int]) -> Score:
    """F1 of the class 1 (scikit-learn's f1_score)."""
    metrics = _sklearn()
    return of_set("f1", lambda a, b: float(metrics.f1_score(a, b, zero_division=0)), wanted, given)


def matthews(wanted: Sequence[float | int], given: Sequence[float | int]) -> Score:
    """Matthews correlation (scikit-learn's matthews_corrcoef)."""
    metrics = _sklearn()
    return of_set("matthews", lambda a, b: float(metrics.matthews_corrcoef(a, b)), wanted, given)


def pearson(wanted: Sequence[float | int], given: Sequence[float | int]) -> Score:
    """Pearson correlation (scipy)."""
    stats = _scipy()
    return of_set("pearson", lambda a, b: float(stats.pearsonr(a, b).statistic), wanted, given)


def spearman(wanted: Sequence[float | int], given: Sequence[float | int]) -> Score:
    """Spearman rank correlation (scipy)."""
    stats = _scipy()
    return of_set("spearman", lambda a, b: float(stats.spearmanr(a, b).statistic), wanted, given)


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise missing("scikit-learn") from error
    return metrics


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise missing("scipy") from error
    return stats


def missing(package: str) -> OptionError:
    """The error for a metric whose library is not installed."""
    return OptionError(f"this metric needs {package}; install bitloft[tasks] with -c constraints.txt.")
