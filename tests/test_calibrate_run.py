"""The calibrated run on tiny models: statistics of the quantized prefix, resume, reuse, every kind of model."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from bitloft.calibrate.run import Known
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.body import Body
from bitloft.integrations.loading import load
from bitloft.modules.linear import quant_linears
from bitloft.quantize import TIMES, quantize
from bitloft.quantize_report import QuantizeReport
from tests.architectures import make
from tests.helpers import WORDS, tiny_llama, tiny_tokenizer

SETTINGS: dict[str, Any] = {
    "format": "lm2:32", "solver": "calibrated", "rank": 4, "samples": 12, "calibrate_length": 32, "rounds": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "t.txt"
    file.write_text(" ".join(f"{WORDS} {i}" for i in range(30)), encoding="utf-8")
    return file


def made(model: Path, out: Path, text: Path, **settings: Any) -> QuantizeReport:
    return quantize(model, out, **{**SETTINGS, "calibrate": str(text), **settings})


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.name != TIMES}


def folder(name: str, directory: Path, **settings: Any) -> Path:
    """A tiny model of an architecture as a folder, with a tokenizer of its vocabulary."""
    tokenizer = tiny_tokenizer(directory)
    make(name, vocab_size=len(tokenizer), **settings).save_pretrained(directory)
    return directory


def test_statistics_are_those_of_the_quantized_prefix(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    """The moments that were saved for block 1 are what the finished base gives its own block 1."""
    report = made(tiny_model, tmp_path / "out", text, statistics=str(tmp_path / "s"))
    assert report.calibration is not None
    assert report.calibration.way == "block by block"
    assert (report.calibration.gathered, report.calibration.tokens) == (2, 384)
    saved = load_file(tmp_path / "s" / "model.layers.1.safetensors")
    assert len(saved) == 4  # q, k and v share one, gate and up another
    model = load(tmp_path / "out")
    found: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda _, args: found.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))

    layers = {n: m for n, m in quant_linears(model).items() if n.startswith("model.layers.1.") and n in saved}
    for name, module in layers.items():
        module.register_forward_pre_hook(note(name))
    ids = AutoTokenizer.from_pretrained(tiny_model)(text.read_text(), return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        model(input_ids=torch.stack([blocks[i * len(blocks) // 12] for i in range(12)]))
    first = "model.layers.1.self_attn.q_proj"  # later ones pass dense weights of their own block
    x = found[first]
    assert torch.allclose(saved[first], x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_every_matrix_reports_its_error_where_inputs_are(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    ours = made(tiny_model, tmp_path / "ours", text)
    none = made(tiny_model, tmp_path / "none", text, metric="none", calibrate=None)
    assert none.calibration is None
    for matrix in ours.matrices:
        assert matrix.calibrated is not None
        assert matrix.calibrated["after"] <= matrix.calibrated["before"]
        assert matrix.calibrated["tokens"] == 384


def test_an_interrupted_run_ends_with_the_same_bytes(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    made(tiny_model, tmp_path / "whole" / "out", text)

    class StopError(Exception):
        pass

    def stop(done: int, total: int, name: str) -> None:
        if done == 9:
            raise StopError

    with pytest.raises(StopError):
        made(tiny_model, tmp_path / "out", text, progress=stop)
    report = made(tiny_model, tmp_path / "out", text, resume=True)
    assert report.resumed == 9
    assert report.calibration is not None
    assert report.calibration.reused == 1  # block 1 was measured before the interruption
    assert digests(tmp_path / "out") == digests(tmp_path / "whole" / "out")


def test_saved_statistics_are_reused_and_those_of_something_else_refused(
    tiny_model: Path, tmp_path: Path, text: Path
) -> None:
    made(tiny_model, tmp_path / "one", text, statistics=str(tmp_path / "s"))
    again = made(tiny_model, tmp_path / "two", text, statistics=str(tmp_path / "s"), format="lm3:32")
    assert again.calibration is not None
    assert (again.calibration.gathered, again.calibration.reused) == (0, 2)
    with pytest.raises(CheckpointError, match=r"was measured on something else .* give another directory"):
        made(tiny_model, tmp_path / "three", text, statistics=str(tmp_path / "s"), samples=11)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("bert", "block by block"),
        ("gpt2", "block by block"),
        ("bart", "block by block"),
        ("t5", "block by block"),
        ("gemma3", "block by block"),
        ("qwen3_moe", "block by block"),
        ("albert", "whole model in memory"),
    ],
)
def test_every_kind_of_model(name: str, way: str, tmp_path: Path, text: Path) -> None:
    layers = {"bart": {"encoder_layers": 2, "decoder_layers": 2}, "t5": {"num_layers": 2}, "gpt2": {}, "albert": {}}
    model = folder(name, tmp_path / "m", **layers.get(name, {"num_hidden_layers": 2}))
    report = made(model, tmp_path / "out", text)
    assert report.calibration is not None
    assert report.calibration.way.startswith(way)
    seen = [m for m in report.matrices if m.calibrated is not None and m.calibrated["tokens"]]
    assert len(seen) > len(report.matrices) * 0.9


def test_the_head_is_measured_on_the_finished_model(tmp_path: Path, text: Path) -> None:
    model = folder("llama", tmp_path / "m", num_hidden_layers=2, tie_word_embeddings=False)
    report = made(model, tmp_path / "out", text, head=True)
    head = next(m for m in report.matrices if m.name == "lm_head")
    assert head.calibrated is not None
    assert head.calibrated["tokens"] == 384


def test_one_block_and_its_moments_are_in_memory(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth: what is real of the dense model, and what the solver knows at once."""
    model, most, known = tiny_llama(tmp_path / "deep", layers=5), [0], [0]
    usual, kept = Body.fill, Known.__init__

    def fill(self: Body, names: Any) -> None:
        usual(self, names)
        blocks = {n.split(".")[2] for n, p in self.model.named_parameters() if ".layers." in n and not p.is_meta}
        most[0] = max(most[0], len(blocks))

    def know(self: Known, statistics: Any, rows: Any) -> None:
        kept(self, statistics, rows)
        known[0] = max(known[0], len(self))

    monkeypatch.setattr(Body, "fill", fill)
    monkeypatch.setattr(Known, "__init__", know)
    report = made(model, tmp_path / "out", text, rounds=1)
    assert report.calibration is not None
    assert report.calibration.gathered == 5
    assert (most[0], known[0]) == (1, 7)
    assert set(report.calibration.seconds) == {"gather", "solve", "advance"}


def test_blocks_are_not_shared_among_processes(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(OptionError, match="jobs is 2, but calibration goes block by block"):
        quantize(tiny_model, tmp_path / "out", jobs=2, **{**SETTINGS, "calibrate": str(text)})


def test_a_text_that_is_missing_is_said(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"which is no file; give a .txt or .jsonl file"):
        made(tiny_model, tmp_path / "out", tmp_path / "none.txt")
