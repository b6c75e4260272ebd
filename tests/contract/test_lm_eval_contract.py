"""What we rely on in lm-eval (0.4.13): a task of one's own from a folder, on a packed base, without a network.

It comes with 387 MB of packages, so `make setup` leaves it out and `make test-eval` runs this file.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration
from typer.testing import CliRunner

from bitloft.cli import app
from bitloft.errors import CheckpointError, DataError, OptionError
from bitloft.integrations.lm_eval import harness
from bitloft.integrations.opening import open_model
from bitloft.quantize import quantize
from bitloft.tune import with_adapter
from tests.helpers import make_adapter, tiny_tokenizer, write_rows
from tests.task_models import tiny_bert

pytest.importorskip("lm_eval", reason="needs lm-eval (make test-eval)")
# datasets leaves a socket of the hub's client open; lm-eval warns of a model that is not a name
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS: list[dict[str, object]] = [
    {"question": f"one two {i}", "choices": [" three", " paris"], "answer": i % 2, "words": ["a", "b"][: 2 - i // 5]}
    for i in range(6)
]
SHARED = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
ROLLED = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
"""
WRITTEN = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - metric: exact_match
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: loose, filter: [{function: lowercase}, {function: take_first}]}
"""


class Place:
    """A packed base, a plain adapter of it, rows, and a folder for task files."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.base, self.tasks = root, root / "base", root / "tasks"
        quantize(source, self.base, format="lm4:32", rank=4)
        self.adapter = make_adapter(root / "adapter", seed=1, base=self.base)
        self.file = write_rows(root / "rows.jsonl", ROWS)
        self.task("choice", CHOICE)
        self.task("rolled", ROLLED)
        self.task("written", WRITTEN)

    def task(self, name: str, text: str, folder: str = "tasks") -> Path:
        (self.root / folder).mkdir(exist_ok=True)
        file = self.root / folder / f"{name}.yaml"
        file.write_text(SHARED.format(name=name, file=self.file) + text, encoding="utf-8")
        return file.parent


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("harness"), tiny_model)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@torch.no_grad()
def said(model: Any, tokenizer: Any, context: list[int], text: list[int]) -> float:
    """Log-probability of ``text`` behind ``context``, by the model itself."""
    logits = model(torch.tensor([context + text])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(text))


def test_choices_are_the_model_s_own(place: Place) -> None:
    model, tokenizer, _ = open_model(place.base)
    found = harness(model, tokenizer, ["choice"], limit=5, include=place.tasks)["choice"]
    right = []
    for row in ROWS[:5]:
        context = tokenizer.encode(row["question"])
        ends = [tokenizer.encode(str(row["question"]) + choice)[len(context) :] for choice in row["choices"]]  # type: ignore[attr-defined]
        scores = [said(model, tokenizer, context, end) for end in ends]
        right.append(int(scores[1] > scores[0]) == row["answer"])
    share = sum(right) / 5
    assert found["acc"] == pytest.approx(share)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 4))
    assert found["sample_len"] == 5


@pytest.mark.parametrize("adapted", [False, True])
def test_texts_have_the_model_s_own_loss(place: Place, adapted: bool) -> None:
    model, tokenizer, _ = open_model(place.base)
    held: Any = with_adapter(model, place.adapter, place.base, None)[0] if adapted else model
    found = harness(held, tokenizer, ["rolled"], include=place.tasks)["rolled"]["bits_per_byte"]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts = [str(row["question"]) for row in ROWS]
    nats = -sum(said(held, tokenizer, [first], tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert found == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5)


def test_the_command_line_takes_own_tasks_and_an_adapter(place: Place) -> None:
    words = ["eval", place.base, "--harness", "rolled,written", "--harness-tasks", place.tasks, "--limit", "4"]

    def run(*more: object) -> Any:
        done = CliRunner().invoke(app, [str(word) for word in (*words, *more)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    alone, adapted = json.loads(run("--json")), json.loads(run("--json", "--adapter", place.adapter))
    assert alone["written"].keys() >= {"exact_match,strict", "exact_match,loose"}
    assert alone["rolled"]["bits_per_byte"] != adapted["rolled"]["bits_per_byte"]
    assert json.loads(run("--json", "--dtype", "bfloat16"))["rolled"] != alone["rolled"]
    assert "bits_per_byte" in run("--shots", "1")


def test_an_encoder_decoder_runs_too(place: Place, tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=len(tiny_tokenizer(tmp_path / "m")), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "base", format="lm4:32", rank=4)
    model, tokenizer, _ = open_model(tmp_path / "base")
    found = harness(model, tokenizer, ["choice"], limit=3, include=place.tasks)
    assert 0 <= found["choice"]["acc"] <= 1


def test_a_group_is_its_tasks_and_their_mean(place: Place) -> None:
    folder = place.task("choice", CHOICE, "grouped")
    (folder / "all.yaml").write_text("group: all_of_it\ntask: [choice]\naggregate_metric_list: [{metric: acc}]\n")
    model, tokenizer, _ = open_model(place.base)
    found = harness(model, tokenizer, ["all_of_it"], include=folder)
    assert found["all_of_it"]["acc"] == found["choice"]["acc"]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (("{{question}}", "{{query}}"), DataError, "cannot load broken .*'query' is undefined.*mend the task's file"),
        (("{{question}}", "{{words[1]}}"), DataError, "a template of broken does not fit the rows"),
        (("rows.jsonl", "gone.jsonl"), DataError, "cannot load the data of broken .*check the task's path"),
        (("test_split: test", "test_split: valid"), DataError, "cannot load broken .*valid"),
        (
            ("metric: acc", "{metric: guess, aggregation: mean, higher_is_better: true}"),
            DataError,
            "measured nothing of broken",
        ),
        (("metric_list", "unsafe_code: true\nmetric_list"), OptionError, "broken runs programs that the model wrote"),
        (("task: broken", "task: other"), OptionError, "has no task 'broken'; `lm-eval ls tasks` names them"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(
    place: Place, tmp_path: Path, change: tuple[str, str], error: type[Exception], sentence: str
) -> None:
    text = SHARED.format(name="broken", file=place.file) + CHOICE
    assert change[0] in text
    (tmp_path / "broken.yaml").write_text(text.replace(*change), encoding="utf-8")
    model, tokenizer, _ = open_model(place.base)
    with pytest.raises(error, match=sentence):
        harness(model, tokenizer, ["broken"], include=tmp_path)


def test_what_cannot_run_is_said(place: Place, tmp_path: Path) -> None:
    model, tokenizer, _ = open_model(place.base)
    with pytest.raises(OptionError, match="is not a folder; give one with lm-eval's task files"):
        harness(model, tokenizer, ["choice"], include=tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        harness(model, None, ["choice"], include=place.tasks)
    encoder, words, _ = open_model(tiny_bert(tmp_path / "bert", labels=2))
    with pytest.raises(CheckpointError, match="BertForSequenceClassification does not continue text"):
        harness(encoder, words, ["choice"], include=place.tasks)
