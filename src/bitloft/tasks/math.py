"""GSM8K and MATH: a worked answer whose last number or boxed expression is compared as mathematics (math-verify).

GSM8K's references end in "#### 18" (Cobbe et al. 2021, arXiv 2110.14168); an answer of the model is read from the same
mark, else from its last number. MATH's are LaTeX in \\boxed{...} (Hendrycks et al. 2021, arXiv 2103.03874). Expressions
are parsed and simplified, so that 1/2, 0.5 and \\frac{1}{2} agree; what cannot be parsed is wrong, never an error.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from bitloft.tasks.scores import Score, mean, missing
from bitloft.tasks.sources import Row, Source
from bitloft.tasks.texts import TextTask

MARK = "####"
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
BOXES = ("\\boxed", "\\fbox")


def final_number(text: str) -> str | None:
    """The number after "####", else the last number, without commas and dollars; None where there is none."""
    tail = text.rpartition(MARK)[2] if MARK in text else text
    found = NUMBER.findall(tail)
    if not found:
        return None
    chosen = found[0] if MARK in text else found[-1]
    return str(chosen).replace(",", "").replace("$", "").rstrip(".")


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces matched; None where there is none or it does not close."""
    at = max(text.rfind(name + "{") for name in BOXES)
    if at < 0:
        return None
    start = text.index("{", at)
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start + 1 : i]
    return None


def equal(given: str, wanted: str) -> bool:
    """Whether two expressions (LaTeX or plain) are the same mathematics."""
    if given.strip() == wanted.strip():
        return True
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise missing("math-verify") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # what it cannot parse is wrong; that is not news
    kinds: Any = [LatexExtractionConfig(), ExprExtractionConfig()]
    # without its alarms: they work in a main thread only
    read = [parse(f"${text}$", extraction_config=kinds, parsing_timeout=None) for text in (wanted, given)]
    try:
        return bool(verify(read[0], read[1], timeout_seconds=None))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
        return False


def _gsm8k(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Score]:
    right = []
    for row, (answer, *_) in zip(rows, answers, strict=True):
        given, wanted = final_number(answer), final_number(row["answer"])
        right.append(float(given is not None and wanted is not None and equal(given, wanted)))
    return [mean("accuracy", right)]


def _math(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Score]:
    right = []
    for row, (answer, *_) in zip(rows, answers, strict=True):
        given, wanted = boxed(answer) or final_number(answer), boxed(row["solution"])
        right.append(float(given is not None and wanted is not None and equal(given, wanted)))
    return [mean("accuracy", right)]


TASKS: dict[str, TextTask] = {
    "gsm8k": TextTask(
        name="gsm8k",
        source=Source(("question", "answer"), "openai/gsm8k", "main"),
        prompt=lambda row: row["question"] + "\n",
        completion=lambda row: row["answer"],
        scores=_gsm8k,
        metrics=("accuracy",),
        tokens=256,
    ),
    "math": TextTask(
        name="math",
        source=Source(
            ("problem", "solution"),
            "nlile/hendrycks-MATH-benchmark",
            files={"train": ("train",), "test": ("test", "test1000", "algebra")},
        ),
        prompt=lambda row: row["problem"] + "\n",
        completion=lambda row: row["solution"],
        scores=_math,
        metrics=("accuracy",),
        tokens=512,
    ),
}
