"""tasks/glue.py: nine tasks and ANLI, their labels as files spell them, and a head that learns."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bitloft.errors import DataError
from bitloft.options import TrainOptions
from bitloft.regimes import fit
from bitloft.tasks.glue import TASKS, Classes
from tests.helpers import shared
from tests.task_models import sentiment, tiny_bert


def test_all_nine_and_their_own_metrics() -> None:
    metrics = {name: task.metrics for name, task in TASKS.items()}
    assert metrics == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
        "anli": ("accuracy",),
    }
    assert TASKS["stsb"].outputs == 1
    assert TASKS["mnli"].outputs == 3


def test_labels_as_files_spell_them() -> None:
    assert [TASKS["mnli"].label(x) for x in ("entailment", 1, "2")] == [0, 1, 2]
    assert [TASKS["anli"].label(x) for x in ("e", "n", "c")] == [0, 1, 2]
    assert TASKS["rte"].label("not_entailment") == 1
    assert TASKS["stsb"].label("2.5") == 2.5
    with pytest.raises(DataError, match="rte has no label 'maybe'; use entailment, not_entailment or 0 to 1"):
        TASKS["rte"].label("maybe")


@pytest.mark.parametrize(
    ("name", "folder", "rows"),
    [("sst2", "sst2", 872), ("mrpc", "mrpc", 408), ("rte", "rte", 277), ("cola", "cola", 1043), ("qnli", "qnli", 5463),
     ("mnli", "mnli", 9815)],
)  # fmt: skip
def test_real_files_have_the_published_rows(name: str, folder: str, rows: int) -> None:
    found = TASKS[name].rows(shared(f"data/glue_{folder}"), "test")
    assert len(found) == rows
    assert {row["label"] for row in found} == set(range(TASKS[name].outputs))


def test_real_anli() -> None:
    found = TASKS["anli"].rows(shared("data/anli"), "test", 100)
    assert len(found) == 100
    assert {row["label"] for row in found} == {0, 1, 2}


def test_an_encoder_learns_a_word(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path / "m", labels=2))
    form = Classes(TASKS["sst2"], AutoTokenizer.from_pretrained(tmp_path / "m"), 32)
    rows = TASKS["sst2"].rows(sentiment(tmp_path / "data"), "train")
    fit(
        model.train(),
        form,
        form.examples(rows),
        TrainOptions(steps=30, lr=5e-3, batch=8, dtype="float32", save_every=0),
    )
    (score,) = form.judge(model.eval(), rows, 5)
    assert score.value == 1.0
    assert score.count == 24


def test_losses_are_cross_entropy_and_squared_error(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path / "m", labels=2)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    form = Classes(TASKS["sst2"], tokenizer, 32)
    batch = form.collate(form.examples([{"sentence": "one", "label": 1}, {"sentence": "the quick fox", "label": 0}]))
    expected = model(**batch).loss
    assert form.losses(model, batch).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    number = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path / "n", labels=1)).eval()
    form = Classes(TASKS["stsb"], tokenizer, 32)
    batch = form.collate(form.examples([{"sentence1": "one", "sentence2": "two", "label": 2.5}]))
    assert batch["labels"].dtype == torch.float32
    with torch.no_grad():
        logits = number(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert form.losses(number, batch).item() == pytest.approx((logits.item() - 2.5) ** 2, rel=1e-5)
