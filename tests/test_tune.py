"""tune.py and judge.py: an adapter with its head goes to disk and comes back the same, plain or packed."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitloft.compress import compress
from bitloft.errors import AdapterError, CheckpointError, DataError, OptionError
from bitloft.judge import judge
from bitloft.quantize import quantize
from bitloft.tasks.words import with_tokenizer
from bitloft.tune import HEAD, TuneReport, tune
from tests.helpers import WORDS, write_rows
from tests.task_models import sentiment, tiny_bert, tiny_words

FAST: dict[str, Any] = {"rank": 4, "batch": 8, "length": 32, "dtype": "float32"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    quantize(tiny_bert(place / "m", labels=2), place / "base", format="lm4:32", rank=4)
    sentiment(place / "data")
    return place


@pytest.fixture(scope="module")
def learned(bert: Path) -> TuneReport:
    report = tune(bert / "base", "sst2", bert / "adapter", bert / "data", steps=40, lr=1e-2, **FAST)
    assert isinstance(report, TuneReport)
    return report


def test_an_encoder_learns_and_its_head_is_kept(bert: Path, learned: TuneReport) -> None:
    assert learned.last_loss < learned.first_loss
    assert learned.head_parameters > 0
    assert (bert / "adapter" / HEAD).exists()
    assert json.loads((bert / "adapter" / "train_report.json").read_text())["task"] == "sst2"
    alone = judge(bert / "base", "sst2", bert / "data", length=32)
    found = judge(bert / "base", "sst2", bert / "data", bert / "adapter", length=32)
    assert found.value("accuracy") == 1.0 > alone.value("accuracy")
    assert (found.rows, found.mismatch, found.sandbox) == (12, None, None)


def test_a_packed_adapter_is_judged_with_the_same_head(bert: Path, learned: TuneReport) -> None:
    compress(bert / "adapter", bert / "packed", bits=8.0, base=None)
    (bert / "packed" / HEAD).write_bytes((bert / "adapter" / HEAD).read_bytes())
    assert judge(bert / "base", "sst2", bert / "data", bert / "packed", length=32).value("accuracy") == 1.0


def test_a_base_without_a_head_gets_one(tmp_path: Path) -> None:
    quantize(tiny_bert(tmp_path / "m"), tmp_path / "base", format="lm4:32", rank=4)
    data = sentiment(tmp_path / "data")
    report = tune(tmp_path / "base", "sst2", tmp_path / "adapter", data, steps=40, lr=1e-2, **FAST)
    assert isinstance(report, TuneReport)
    assert judge(tmp_path / "base", "sst2", data, tmp_path / "adapter", length=32).value("accuracy") == 1.0


def test_an_encoder_decoder(tmp_path: Path) -> None:
    folder = with_tokenizer(tiny_words(tmp_path / "m"), tmp_path / "words")
    quantize(folder, tmp_path / "base", format="lm4:32", rank=4)
    report = tune(tmp_path / "base", "g2p", tmp_path / "adapter", tmp_path / "m", steps=2, limit=8, **FAST)
    assert isinstance(report, TuneReport)
    assert (report.head_parameters, report.rows) == (0, 8)
    found = judge(tmp_path / "base", "g2p", tmp_path / "m", tmp_path / "adapter", length=32, limit=3)
    assert [score.name for score in found.scores] == ["words", "phoneme_error", "loss"]


def test_a_decoder_s_task_goes_through_train(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "base", format="lm4:32", rank=4)
    (tmp_path / "data").mkdir()
    rows: list[dict[str, object]] = [{"question": WORDS[:30], "answer": f"so it is\n#### {i}"} for i in range(6)]
    for name in ("train", "test"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    report = tune(tmp_path / "base", "gsm8k", tmp_path / "adapter", tmp_path / "data", steps=2, **FAST | {"length": 96})
    assert not isinstance(report, TuneReport)
    assert report.data.rows == 6
    found = judge(tmp_path / "base", "gsm8k", tmp_path / "data", tmp_path / "adapter", length=96, generates=False)
    assert [score.name for score in found.scores] == ["loss"]


def test_what_is_refused(bert: Path, learned: TuneReport, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown task 'sst3'; use one of"):
        judge(bert / "base", "sst3", bert / "data")
    with pytest.raises(OptionError, match="has a head of 2 outputs and mnli wants 3"):
        judge(bert / "base", "mnli", _mnli(tmp_path))
    with pytest.raises(DataError, match=r"there is no test data of rte at .* columns sentence1, sentence2, label"):
        judge(bert / "base", "rte", tmp_path / "nowhere")
    with pytest.raises(OptionError, match="is answered in text, and BertForSequenceClassification writes none"):
        judge(bert / "base", "gsm8k", _gsm8k(tmp_path), length=64)
    with pytest.raises(OptionError, match="allow it with --allow-code-execution"):
        judge(tiny_model, "humaneval", _humaneval(tmp_path), length=64)
    with pytest.raises(CheckpointError, match="exists already"):
        tune(bert / "base", "sst2", bert / "adapter", bert / "data")
    with pytest.raises(OptionError, match="is not resumed"):
        tune(bert / "base", "sst2", tmp_path / "x", bert / "data", resume=True, **FAST)
    with pytest.raises(OptionError, match="has no metric 'f1'; it has accuracy"):
        judge(bert / "base", "sst2", bert / "data", length=32).value("f1")
    quantize(tiny_bert(tmp_path / "other", labels=2), tmp_path / "base", format="lm2:32", rank=2)
    with pytest.raises(AdapterError):
        judge(tmp_path / "base", "sst2", bert / "data", bert / "adapter", length=32, base_mismatch="refuse")


def _mnli(place: Path) -> Path:
    return write_rows(place / "mnli.jsonl", [{"premise": "a", "hypothesis": "b", "label": 0}])


def _gsm8k(place: Path) -> Path:
    return write_rows(place / "gsm8k.jsonl", [{"question": "a", "answer": "#### 1"}])


def _humaneval(place: Path) -> Path:
    row: dict[str, object] = {"prompt": "def f():\n", "canonical_solution": " pass", "test": "", "entry_point": "f"}
    return write_rows(place / "humaneval.jsonl", [row])
