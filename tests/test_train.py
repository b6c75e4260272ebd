"""train.py: an adapter that repeats, resumes after a kill, loads in plain PEFT, and refuses what it cannot do."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitloft.adapters import read_adapter
from bitloft.checkpoint import PICKLES, read_json, read_tensors
from bitloft.errors import BitloftError, CheckpointError, DataError, OptionError
from bitloft.evaluate import evaluate
from bitloft.integrations.peft import save_adapter
from bitloft.integrations.record import base_record
from bitloft.options import TrainOptions
from bitloft.quantize import quantize
from bitloft.train import train
from tests.helpers import WORDS, write_rows

ROOT = Path(__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"
# small, and with dropout, so that a random state that is not restored shows
SMALL: dict[str, Any] = {
    "steps": 6, "rank": 4, "batch": 2, "length": 48, "lr": 1e-2, "dropout": 0.1, "dtype": "float32", "save_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "base"
    quantize(tiny_model, out, format="lm2:32", rank=4)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
    rows: list[dict[str, object]] = [
        {"text": WORDS},
        {"prompt": "the quick", "completion": "brown fox"},
        {"messages": turns, "id": 3},
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of an uninterrupted run."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    train(base, data, out, **SMALL)
    return out


def tensors(adapter: Path) -> dict[str, Tensor]:
    return read_tensors(adapter / WEIGHTS)


def same(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def python(code: str, *args: object) -> "subprocess.Popen[str]":
    """A fresh process, on one thread as the tests are."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"import torch; torch.set_num_threads(1)\n{code}", *map(str, args)],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_report_and_files(base: Path, data: Path, trained: Path) -> None:
    assert {file.name for file in trained.iterdir()} == {
        "adapter_config.json", WEIGHTS, "bitloft_adapter.json", "train_report.json",
    }  # fmt: skip
    assert not trained.with_name("adapter.work").exists()
    report = read_json(trained / "train_report.json")
    assert (report["steps"], report["rank"], report["scaling"], report["start"]) == (6, 4, 1.0, "frozen")
    assert report["parameters"] == sum(t.numel() for t in tensors(trained).values())
    assert report["dtype"] == "float32"
    assert report["dtype_why"] == "asked for"
    assert report["resumed_from"] is None
    assert [entry[0] for entry in report["history"]] == [1, 5, 6]
    assert (report["data"]["rows"], report["data"]["unused_keys"]) == (3, {"id": 1})
    record = base_record(base)
    adapter = read_adapter(trained)
    assert (adapter.base, adapter.source) == (record.fingerprint, record.source)
    assert len(adapter.pairs) == 14
    assert evaluate(base, data, trained, length=48).loss < evaluate(base, data, length=48).loss - 0.02


def test_same_seed_same_bytes(base: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    train(base, data, tmp_path / "again", **SMALL)
    assert same(tmp_path / "again", trained)
    train(base, data, tmp_path / "other", **SMALL | {"seed": 1})
    assert not same(tmp_path / "other", trained)


KILLED = """
import sys, time
from bitloft.train import train
def hang(step, steps, text):
    if step == 5:
        time.sleep(120)
train(sys.argv[1], sys.argv[2], sys.argv[3], progress=hang, **SETTINGS)
"""


@pytest.mark.parametrize("start", ["frozen", "trainable"])
def test_killed_and_resumed_equals_uninterrupted(
    start: str, base: Path, data: Path, trained: Path, tmp_path: Path
) -> None:
    """SIGKILL after step 5 of 6, the checkpoint being of step 3; the resumed run ends in the same bytes."""
    settings = SMALL | ({} if start == "frozen" else {"start": start, "rank": None})
    reference, out = trained, tmp_path / "adapter"
    if start == "trainable":
        reference = tmp_path / "reference"
        train(base, data, reference, **settings)
    process = python(f"SETTINGS = {settings!r}\n{KILLED}", base, data, out)
    done = out.with_name("adapter.work") / "checkpoint-3" / "complete.json"
    for _ in range(600):
        if done.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(1.0)  # into step 5
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert done.exists(), errors
    assert not out.exists()
    with pytest.raises(CheckpointError, match="holds an interrupted run; resume it, or remove the directory"):
        train(base, data, out, **settings)
    with pytest.raises(CheckpointError, match=r"had lr 0\.01, now it is 0\.02; resume with the same settings"):
        train(base, data, out, **settings | {"lr": 0.02, "resume": True})
    report = train(base, data, out, **settings | {"resume": True})
    assert report.resumed_from == 3
    assert same(out, reference)
    assert [entry[0] for entry in report.history] == [1, 5, 6]
    assert not out.with_name("adapter.work").exists()


def test_resume_on_other_data_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    work = tmp_path / "adapter.work"
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(data.read_bytes())

    def stop(step: int, steps: int, text: str) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, copy, tmp_path / "adapter", progress=stop, **SMALL)
    assert work.exists()
    with copy.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(CheckpointError, match="had data '"):
        train(base, copy, tmp_path / "adapter", resume=True, **SMALL)
    assert not [path for path in work.rglob("*") if path.suffix in PICKLES]
    train(base, copy, tmp_path / "adapter", overwrite=True, **SMALL)
    assert not work.exists()


def test_resume_with_nothing_to_resume_begins(base: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    report = train(base, data, tmp_path / "adapter", **SMALL | {"resume": True})
    assert report.resumed_from is None
    assert same(tmp_path / "adapter", trained)


PLAIN = """
import sys
from peft import PeftModel
from safetensors.torch import save_file
from bitloft.integrations.loading import load
model = PeftModel.from_pretrained(load(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(3, 35).reshape(2, 16)).logits}, sys.argv[3])
"""


@pytest.mark.parametrize("start", ["frozen", "trainable"])
def test_plain_peft_loads_it_in_a_fresh_process(
    start: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of the model that was trained are those of the directory, loaded by PEFT elsewhere."""
    kept: dict[str, Tensor] = {}

    def keep(model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            kept["logits"] = model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits
        return save_adapter(model, *args, **kwargs)

    monkeypatch.setattr(importlib.import_module("bitloft.train"), "save_adapter", keep)
    train(base, data, tmp_path / "adapter", **SMALL | ({} if start == "frozen" else {"start": start, "rank": None}))
    process = python(PLAIN, base, tmp_path / "adapter", tmp_path / "logits.safetensors")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found = read_tensors(tmp_path / "logits.safetensors")["logits"]
    if start == "frozen":
        assert torch.equal(found, kept["logits"])
    else:  # the difference was refactored: equal in exact arithmetic
        torch.testing.assert_close(found, kept["logits"], rtol=1e-4, atol=1e-4)


def test_trained_start_means_the_same_as_any_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    report = train(base, data, tmp_path / "adapter", **SMALL | {"start": "trainable", "rank": None})
    assert (report.rank, report.scaling, report.start) == (8, 1.0, "trainable")
    assert read_json(tmp_path / "adapter" / "bitloft_adapter.json")["start"] == "trainable"
    without, tuned = evaluate(base, data, length=48), evaluate(base, data, tmp_path / "adapter", length=48)
    assert tuned.loss < without.loss - 0.02


def test_existing_adapter_is_kept_unless_overwritten(base: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    before = (trained / WEIGHTS).read_bytes()
    for extra in ({}, {"resume": True}):
        with pytest.raises(CheckpointError, match="exists already; remove it or choose another place"):
            train(base, data, trained, **SMALL | extra)
    assert (trained / WEIGHTS).read_bytes() == before
    out = tmp_path / "adapter"
    out.mkdir()
    train(base, data, out, overwrite=True, **SMALL | {"steps": 1})
    assert (out / WEIGHTS).exists()


def test_progress_counts_steps(base: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[tuple[int, int, str]] = []
    settings = SMALL | {"steps": None, "epochs": 2.0, "accumulate": 2}
    report = train(base, data, tmp_path / "adapter", progress=lambda *words: said.append(words), **settings)
    examples = report.data.examples
    assert report.steps == 2 * math.ceil(math.ceil(examples / 2) / 2)
    assert report.epochs == pytest.approx(2.0)
    assert [words[:2] for words in said] == [(n, report.steps) for n in range(1, report.steps + 1)]
    assert said[-1][2].startswith("loss 5.")
    out, err = capfd.readouterr()
    assert "loss" not in out + err  # the verb does not print


def test_bfloat16_autocast(base: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    report = train(base, data, tmp_path / "adapter", **SMALL | {"dtype": "bfloat16"})
    assert report.dtype == "bfloat16"
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "adapter").values())
    exact = read_json(trained / "train_report.json")
    assert report.first_loss == pytest.approx(exact["first_loss"], rel=1e-2)
    assert report.first_loss != exact["first_loss"]


def test_nan_leaves_no_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(BitloftError, match=r"loss became (nan|inf) at step \d+; .* \(now 1e\+30\)"):
        train(base, data, tmp_path / "adapter", **SMALL | {"lr": 1e30, "dropout": 0.0, "warmup": 0.0})
    assert not (tmp_path / "adapter").exists()
    train(base, data, tmp_path / "adapter", **SMALL)  # no checkpoint was left, so nothing is in the way


def test_bad_input_is_refused_before_training(base: Path, data: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="is not a bitloft base; make one with `bitloft quantize"):
        train(tiny_model, data, out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: empty row"):
        train(base, bad, out)
    with pytest.raises(OptionError, match="length 1024 is beyond the 256 positions"):
        train(base, data, out, length=1024)
    with pytest.raises(OptionError, match="rank 100 is larger than"):
        train(base, data, out, rank=100, length=48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_damaged_checkpoint_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"

    def stop(step: int, steps: int, text: str) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, data, out, progress=stop, **SMALL)
    file = tmp_path / "adapter.work" / "checkpoint-3" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not a valid safetensors file"):
        train(base, data, out, **SMALL | {"resume": True})
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"start": "warm"}, "unknown start 'warm'; use one of frozen, trainable"),
        ({"schedule": "steps"}, "unknown schedule 'steps'; use one of cosine, linear, constant"),
        ({"dtype": "half"}, "unknown dtype 'half'"),
        ({"start": "trainable", "rank": 8}, "rank is fixed by the base where its start is trained"),
        ({"start": "trainable", "alpha": 8.0}, "alpha is fixed by the base"),
        ({"start": "trainable", "rslora": True}, "rslora is fixed by the base"),
        ({"start": "trainable", "target": ("q_proj",)}, "target is fixed by the base"),
        ({"rank": 0}, "rank is 0; use a positive number"),
        ({"lr": float("nan")}, "lr is nan; use a positive number"),
        ({"steps": -1}, "steps is -1; use a positive number"),
        ({"epochs": 0.0}, "epochs is 0.0; use a positive number"),
        ({"batch": 0}, "batch is 0; use a positive number"),
        ({"length": 1}, "length is 1; use 2 or more"),
        ({"save_every": -1}, "save_every is -1; use 0"),
        ({"dropout": 1.0}, "dropout is 1.0; use a share"),
        ({"warmup": -0.1}, "warmup is -0.1; use a share"),
    ],
)
def test_bad_options(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        TrainOptions(**settings)


def test_report_is_json(trained: Path) -> None:
    assert json.loads((trained / "train_report.json").read_text(encoding="utf-8"))["out"].endswith("adapter")
