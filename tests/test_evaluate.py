"""evaluate.py: the loss is the model's own, the standard error is honest, adapters of both kinds count."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitloft.compress import compress, expand
from bitloft.errors import AdapterError, CheckpointError, DataError, OptionError
from bitloft.evaluate import evaluate, mean_and_stderr
from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record
from bitloft.quantize import quantize
from tests.helpers import WORDS, make_adapter, tiny_llama, write_rows

TURNS = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "base"
    quantize(tiny_model, out, format="lm4:32", rank=4)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, object]] = [{"text": WORDS}, {"text": WORDS[::-1]}, {"messages": TURNS}, {"text": "the fox"}]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def test_loss_is_that_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
    report = evaluate(tiny_model, tmp_path / "words.txt", length=256)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny_model)(WORDS, return_tensors="pt")["input_ids"]
    expected = float(model(input_ids=ids, labels=ids).loss.detach())
    assert report.loss == pytest.approx(expected, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (report.tokens, report.clusters, report.stderr, report.perplexity_stderr) == (ids.numel() - 1, 1, None, None)
    assert report.dtype == "float32"


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batch_size_does_not_change_the_result(base: Path, data: Path, batch: int) -> None:
    one = evaluate(base, data, length=64, batch=2)
    other = evaluate(base, data, length=64, batch=batch)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.stderr == pytest.approx(one.stderr, rel=1e-4)
    assert (other.tokens, other.clusters) == (one.tokens, 4)  # four rows, however many blocks


def test_one_document_is_clustered_by_block(base: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
    report = evaluate(base, tmp_path / "words.txt", length=16)
    assert report.clusters == report.sequences > 3
    assert report.stderr is not None
    assert report.perplexity_stderr == pytest.approx(report.perplexity * report.stderr)


def test_limit_and_progress(base: Path, data: Path) -> None:
    told: list[tuple[int, int, str]] = []
    report = evaluate(base, data, length=16, limit=3, batch=2, progress=lambda *said: told.append(said))
    assert report.sequences == 3
    assert [said[:2] for said in told] == [(2, 3), (3, 3)]
    assert told[-1][2] == f"loss {report.loss:.3f}"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(2, 40))
def test_stderr_of_equal_clusters_is_the_plain_one(seed: int, m: int) -> None:
    losses = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = torch.full((m,), 7.0, dtype=torch.float64)
    mean, stderr = mean_and_stderr(losses * 7, counts)
    assert mean == pytest.approx(float(losses.mean()))
    assert stderr == pytest.approx(float(losses.std() / math.sqrt(m)))


def test_stderr_covers_the_spread_of_repeated_draws() -> None:
    """Over many draws of ragged clusters the standard error matches how much the estimate really moves."""
    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    for _ in range(400):
        counts = torch.randint(1, 30, (60,), generator=generator).double()
        level = 3 + torch.randn(60, generator=generator, dtype=torch.float64)  # what the tokens of a cluster share
        mean, stderr = mean_and_stderr(level * counts, counts)
        assert stderr is not None
        means.append(mean)
        errors.append(stderr)
    spread = float(torch.tensor(means).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.12)


def test_adapter_plain_and_packed(base: Path, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = make_adapter(tmp_path / "adapter", scale=0.5, base=base)
    compress(adapter, tmp_path / "packed", bits=4.5)
    expand(tmp_path / "packed", tmp_path / "expanded")
    without = evaluate(base, data, length=32)
    plain = evaluate(base, data, adapter, length=32)
    packed = evaluate(base, data, tmp_path / "packed", length=32)
    tuned = PeftModel.from_pretrained(load(base), adapter)
    reference = evaluate(tuned.get_base_model(), data, length=32)  # PEFT's layers are inside
    assert plain.loss == pytest.approx(reference.loss, rel=1e-5)
    expanded = evaluate(base, data, tmp_path / "expanded", length=32)
    assert packed.loss == pytest.approx(expanded.loss, rel=1e-5)
    assert len({round(report.loss, 5) for report in (without, plain, packed)}) == 3


def test_loaded_model_is_left_as_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base=base)
    model = load(base)
    before = evaluate(model, data, length=32)
    with_adapter = evaluate(model, data, adapter, length=32)
    after = evaluate(model, data, length=32)
    assert before.loss == after.loss != with_adapter.loss
    assert not any(module._forward_hooks for module in model.modules())


def test_bfloat16_only_when_asked(base: Path, data: Path) -> None:
    exact, half = evaluate(base, data, length=32), evaluate(base, data, length=32, dtype="bfloat16")
    assert (exact.dtype, half.dtype) == ("float32", "bfloat16")
    assert half.loss == pytest.approx(exact.loss, rel=1e-2)
    assert half.loss != exact.loss


def test_adapter_of_another_base_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    record = {"schema": 1, "base": "0" * 64, "source": None, "start": "frozen"}
    (adapter / "bitloft_adapter.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(AdapterError, match="trained for another base"):
        evaluate(base, data, adapter, length=32)
    record["base"] = base_record(base).fingerprint
    (adapter / "bitloft_adapter.json").write_text(json.dumps(record), encoding="utf-8")
    evaluate(base, data, adapter, length=32)


def test_bad_input(base: Path, data: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="length 300 is beyond the 256 positions"):
        evaluate(base, data, length=300)
    with pytest.raises(DataError, match="there is no data file"):
        evaluate(base, tmp_path / "absent.jsonl")
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate(tmp_path / "absent", data)
    shutil.copytree(tiny_model, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        evaluate(tmp_path / "mute", data)


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"length": 1}, "length is 1; use 2 or more"),
        ({"limit": 0}, "limit is 0; use a positive number"),
        ({"batch": -1}, "batch is -1; use a positive number"),
        ({"dtype": "half"}, "unknown dtype 'half'; use one of auto, float32, bfloat16"),
    ],
)
def test_bad_options(base: Path, data: Path, settings_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        evaluate(base, data, **settings_)


def test_untied_model_of_other_width(data: Path, tmp_path: Path) -> None:
    """A dense folder of fp16 weights is measured in float32."""
    folder = tiny_llama(tmp_path / "model", hidden=32, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(folder)
    assert evaluate(folder, data, length=32).loss == pytest.approx(math.log(320), rel=0.1)
