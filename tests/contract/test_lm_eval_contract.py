"""What we rely on in lm-eval (0.4.13): a task of one's own from a folder, on a packed base, without a network."""

from pathlib import Path

import pytest

from bitloft.errors import OptionError
from bitloft.integrations.lm_eval import harness
from bitloft.integrations.opening import open_model
from bitloft.quantize import quantize
from tests.helpers import write_rows

pytest.importorskip("lm_eval", reason="needs lm-eval (bitloft[eval])")

TASK = """
task: two_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.filterwarnings("ignore")
def test_a_packed_base_runs_a_local_task(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    quantize(tiny_model, tmp_path / "base", format="lm4:32", rank=4)
    rows: list[dict[str, object]] = [
        {"question": f"one two {i}", "choices": [" three", " paris"], "answer": i % 2} for i in range(6)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "two_words.yaml").write_text(TASK.format(file=file))
    model, tokenizer, _ = open_model(tmp_path / "base")
    found = harness(model, tokenizer, ["two_words"], limit=4, include=str(tmp_path / "tasks"))
    assert 0 <= found["two_words"]["acc"] <= 1
    assert "acc_stderr" in found["two_words"]
    with pytest.raises(OptionError, match="has no task 'nonsense'"):
        harness(model, tokenizer, ["nonsense"])
