"""tasks/catalog.py: every task of the papers by name, forms by the kind of model, calibration text of a task's rows."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitloft.errors import OptionError
from bitloft.tasks.catalog import TASKS, calibration_text, find_task, form_of, head_of
from bitloft.tasks.documents import Documents
from bitloft.tasks.glue import Classes
from bitloft.tasks.squad import Spans
from bitloft.tasks.texts import Answers, Sequences

DECODER = SimpleNamespace(is_encoder_decoder=False, architectures=["LlamaForCausalLM"])
BART = SimpleNamespace(is_encoder_decoder=True, architectures=["BartForConditionalGeneration"])
BERT = SimpleNamespace(is_encoder_decoder=False, architectures=["BertModel"])


def test_every_task_of_the_papers_is_there() -> None:
    glue = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    others = {"wikitext2", "gsm8k", "math", "humaneval", "mbpp", "squad", "anli", "xsum", "cnn_dailymail"}
    assert set(TASKS) == glue | others
    with pytest.raises(OptionError, match="unknown task 'sst3'; use one of anli, cnn_dailymail"):
        find_task("sst3")


def test_forms_by_kind_of_model() -> None:
    tokenizer = object()
    assert isinstance(form_of(TASKS["sst2"], BERT, tokenizer, length=8), Classes)
    assert isinstance(form_of(TASKS["squad"], BERT, tokenizer, length=8), Spans)
    assert isinstance(form_of(TASKS["wikitext2"], DECODER, tokenizer, length=8), Documents)
    assert isinstance(form_of(TASKS["xsum"], BART, tokenizer, length=8), Sequences)
    found = form_of(TASKS["mbpp"], DECODER, tokenizer, length=8, samples=5, allow_code=True)
    assert isinstance(found, Answers)
    assert found.task.samples == 5
    assert isinstance(form_of(TASKS["mbpp"], DECODER, tokenizer, length=8, generates=False), Answers)
    with pytest.raises(OptionError, match="--allow-code-execution"):
        form_of(TASKS["mbpp"], DECODER, tokenizer, length=8)
    with pytest.raises(OptionError, match="BertModel writes none"):
        form_of(TASKS["xsum"], BERT, tokenizer, length=8)
    with pytest.raises(OptionError, match="needs a tokenizer"):
        form_of(TASKS["sst2"], BERT, None, length=8)
    heads = [head_of(TASKS[name]) for name in ("sst2", "squad", "xsum")]
    assert heads == ["AutoModelForSequenceClassification", "AutoModelForQuestionAnswering", None]


def test_calibration_text_is_the_rows_own(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a"}
    file = calibration_text(TASKS["gsm8k"], [row], tmp_path / "x" / "gsm8k")
    assert json.loads(file.read_text()) == {"prompt": "q\n", "completion": "a"}
    file = calibration_text(TASKS["mrpc"], [{"sentence1": "a", "sentence2": "b", "label": 1}], tmp_path / "mrpc")
    assert file.read_text() == "a\nb"
    file = calibration_text(TASKS["squad"], [{"question": "a", "context": "b", "answers": {}}], tmp_path / "squad")
    assert file.read_text() == "a\nb"
    assert calibration_text(TASKS["wikitext2"], [{"text": "t"}], tmp_path / "w").read_text() == "t"
