"""HumanEval and MBPP: a function is written and its tests are run; pass@k by the unbiased estimator.

    pass@k = mean over problems of  1 - C(n - c, k) / C(n, k)      n answers, c of them right (Chen et al. 2021)

Answers are programs that a model made up: they run in ``sandbox`` only, and only where that was allowed by name
(``--allow-code-execution``; ``catalog.form_of`` refuses without). MBPP is the sanitized set (Austin et al. 2021).
"""

import math
from collections.abc import Sequence

from bitloft.errors import OptionError
from bitloft.tasks import sandbox
from bitloft.tasks.scores import Score, mean
from bitloft.tasks.sources import Row, Source
from bitloft.tasks.texts import TextTask

KS = (1, 10, 100)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k answers drawn from n, of which c are right, is right. Raises OptionError for k > n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise OptionError(f"pass@{k} of {n} answers, {c} of them right, does not exist; use 1 <= k <= n.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def program(answer: str, prompt: str) -> str:
    """The code of an answer: what its first fence holds, else the answer after ``prompt``, which opens a function."""
    if "```" in answer:
        inside = answer.split("```")[1]
        head, _, rest = inside.partition("\n")
        return rest if head.strip().lower() in ("python", "py", "") else inside
    return prompt + answer


def _humaneval(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Score]:
    def whole(row: Row, answer: str) -> str:
        code = program(answer, row["prompt"])
        if f"def {row['entry_point']}" not in code:
            code = row["prompt"] + code
        return f"{code}\n{row['test']}\ncheck({row['entry_point']})\n"

    return _passed([[whole(row, answer) for answer in given] for row, given in zip(rows, answers, strict=True)])


def _mbpp(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Score]:
    def whole(row: Row, answer: str) -> str:
        return "\n".join([*row["test_imports"], program(answer, ""), *row["test_list"], ""])

    return _passed([[whole(row, answer) for answer in given] for row, given in zip(rows, answers, strict=True)])


def _passed(programs: Sequence[Sequence[str]]) -> list[Score]:
    """pass@k for every k of ``KS`` that there are answers for."""
    right = [[sandbox.run(text).passed for text in texts] for texts in programs]
    n = min(map(len, right))
    return [mean(f"pass@{k}", [pass_at_k(len(r), sum(r), k) for r in right]) for k in KS if k <= n]


def _mbpp_prompt(row: Row) -> str:
    """The task in words with its first test, which gives the function's name (as the paper asks)."""
    return f"{row['prompt']} Your code should pass this test:\n{row['test_list'][0]}\n```python\n"


TASKS: dict[str, TextTask] = {
    "humaneval": TextTask(
        name="humaneval",
        source=Source(
            ("prompt", "canonical_solution", "test", "entry_point"),
            "openai/openai_humaneval",
            splits={"train": "test", "test": "test"},
            files={"train": ("train", "HumanEval"), "test": ("test", "HumanEval")},
        ),
        prompt=lambda row: row["prompt"],
        completion=lambda row: row["canonical_solution"],
        scores=_humaneval,
        metrics=("pass@1",),
        tokens=384,
        stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("),
        runs_code=True,
    ),
    "mbpp": TextTask(
        name="mbpp",
        source=Source(
            ("prompt", "code", "test_list", "test_imports"),
            "google-research-datasets/mbpp",
            "sanitized",
            files={"train": ("train", "sanitized"), "test": ("test", "sanitized")},
            lists=("test_list", "test_imports"),
        ),
        prompt=_mbpp_prompt,
        completion=lambda row: row["code"] + "\n```",
        scores=_mbpp,
        metrics=("pass@1",),
        tokens=256,
        stop=("\n```",),
        runs_code=True,
    ),
}
