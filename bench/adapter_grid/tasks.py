"""Training and judging rows of each task, from the shared data folder; ``words`` is the toy of --smoke.

XSum trains on rows 0-799 and is judged on 800-999; sanitized MBPP on 0-339 and 340-426; GSM8K on its train file's first
2,000 rows and its test file's first 200; HumanEval's solutions train with MBPP on 0-119 and are judged on 120-163; the
Python reference on whole topics, others held out. SST-2 and MRPC are read by the encoder's own file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]
SPLITS = {
    "gsm8k": "train.jsonl 0-1999 / test.jsonl 0-199",
    "xsum": "test.jsonl 0-799 / 800-999",
    "mbpp": "sanitized.jsonl 0-339 / 340-426",
    "humaneval": "HumanEval.jsonl 0-119 and sanitized.jsonl 0-339 / HumanEval.jsonl 120-163",
    "sst2": "train.tsv 0-3999 / validation.tsv",
    "mrpc": "train.tsv / validation.tsv",
    "reference": "pydoc topics, by the hash of their names",
    "words": "eight made-up rows / four",
}


def rows_of(task: str, shared: Path) -> Split:
    """(training rows, judging rows). Raises FileNotFoundError where the shared data is absent."""
    return TASKS[task](shared)


def gsm8k(shared: Path) -> Split:
    folder = shared / "data" / "gsm8k"
    train, judge = (_pairs(folder / f"{name}.jsonl", "question", "answer") for name in ("train", "test"))
    return train[:2000], judge[:200]


def xsum(shared: Path) -> Split:
    rows = _pairs(shared / "data" / "xsum" / "test.jsonl", "document", "summary", "\n\nSummary in one sentence:")
    return rows[:800], rows[800:1000]


def mbpp(shared: Path) -> Split:
    rows = _pairs(shared / "data" / "mbpp" / "sanitized.jsonl", "prompt", "code", "\n```python\n")
    return rows[:340], rows[340:427]


def humaneval(shared: Path) -> Split:
    file = shared / "data" / "humaneval" / "HumanEval.jsonl"
    rows = _pairs(file, "prompt", "canonical_solution", "")
    return rows[:120] + mbpp(shared)[0], rows[120:]


def reference(shared: Path) -> Split:
    from scripts.demo.data import reference as split

    found = split()
    return found.train, found.held


def words(shared: Path) -> Split:
    text = "the quick brown fox jumps over the lazy dog . a base is frozen and an adapter is trained on it in turn"
    rows = [{"text": " ".join(text.split()[i:] + text.split()[:i])} for i in range(12)]
    return rows[:8], rows[8:]


TASKS: dict[str, Callable[[Path], Split]] = {
    "gsm8k": gsm8k,
    "xsum": xsum,
    "mbpp": mbpp,
    "humaneval": humaneval,
    "reference": reference,
    "words": words,
}


def _pairs(file: Path, prompt: str, completion: str, between: str = "\n") -> list[Row]:
    lines = file.read_text(encoding="utf-8").split("\n")  # some texts hold U+2028, which splitlines would break on
    rows = [json.loads(line) for line in lines if line]
    return [{"prompt": row[prompt] + between, "completion": row[completion]} for row in rows]
