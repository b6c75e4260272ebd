"""XSum and CNN/DailyMail: an article in, a summary out, judged by ROUGE-1, ROUGE-2 and ROUGE-L (package rouge-score).

F-measures with stemming, as the published figures have them; ROUGE-L of CNN/DailyMail counts sentences on lines
of their own (rougeLsum), of XSum, whose summaries are one sentence, the text whole. Sources: Narayan et al. 2018 (arXiv
1808.08745), See et al. 2017 (arXiv 1704.04368), Lin 2004. A decoder is asked in words; an encoder-decoder reads the
article alone.
"""

import re
from collections.abc import Sequence
from typing import Any

from bitloft.tasks.scores import Score, mean, missing
from bitloft.tasks.sources import Row, Source
from bitloft.tasks.texts import TextTask

ASKED = "\n\nSummary in one sentence:"  # what a decoder reads after the article


def rouge(given: Sequence[str], wanted: Sequence[str], *, by_lines: bool) -> list[Score]:
    """ROUGE-1, -2 and -L, each with its error over rows."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing("rouge-score") from error
    last = "rougeLsum" if by_lines else "rougeL"
    scorer: Any = RougeScorer(["rouge1", "rouge2", last], use_stemmer=True)
    found = [scorer.score(_lines(a) if by_lines else a, _lines(b) if by_lines else b) for a, b in _pairs(wanted, given)]
    names = {"rouge1": "rouge1", "rouge2": "rouge2", last: "rougeL"}
    return [mean(name, [row[key].fmeasure for row in found]) for key, name in names.items()]


def _pairs(wanted: Sequence[str], given: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(wanted, given, strict=True))


def _lines(text: str) -> str:
    """One sentence a line."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


def _task(name: str, article: str, summary: str, source: Source, tokens: int, by_lines: bool) -> TextTask:
    def scores(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Score]:
        return rouge([a[0].strip() for a in answers], [row[summary] for row in rows], by_lines=by_lines)

    return TextTask(
        name=name,
        source=source,
        prompt=lambda row: row[article],
        completion=lambda row: row[summary],
        scores=scores,
        metrics=("rouge1", "rouge2", "rougeL"),
        tokens=tokens,
        suffix=ASKED,
    )


TASKS: dict[str, TextTask] = {
    "xsum": _task(
        "xsum", "document", "summary", Source(("document", "summary"), "EdinburghNLP/xsum"), tokens=64, by_lines=False
    ),
    "cnn_dailymail": _task(
        "cnn_dailymail",
        "article",
        "highlights",
        Source(
            ("article", "highlights"),
            "abisee/cnn_dailymail",
            "3.0.0",
            files={"train": ("train", "pairs100"), "test": ("test", "pairs100")},
            aliases={"text": "article", "summary": "highlights"},
        ),
        tokens=142,
        by_lines=True,
    ),
}
