"""target_bits through the quantize verb: inside the budget, better than one width, checked on text, refused by name."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitloft import console, widths
from bitloft.cli import app
from bitloft.errors import CheckpointError, OptionError
from bitloft.formats import Format
from bitloft.integrations import register
from bitloft.integrations.source import open_source
from bitloft.modules.linear import quant_linears
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from bitloft.rules import resolve
from tests.architectures import make
from tests.helpers import WORDS, tiny_llama


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose second layer is ten times louder than its first."""
    folder = tiny_llama(tmp_path_factory.mktemp("uneven"), layers=4)
    tensors = load_file(folder / "model.safetensors")
    loud = {k: v * 10 if ".layers.1." in k and v.ndim == 2 else v for k, v in tensors.items()}
    save_file(loud, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def squared_error(folder: Path, base: Path) -> float:
    """|W - Q|^2 over all packed matrices, from the files."""
    register()
    original = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return sum(
        float((original[f"{name}.weight"].float() - layer.dense()).square().sum())
        for name, layer in quant_linears(model).items()
    )


def test_the_budget_is_met_and_better_used_than_by_one_width(uneven: Path, tmp_path: Path) -> None:
    report = quantize(uneven, tmp_path / "base", target_bits=3.5, solver="qlora")
    assert 0.99 * 3.5 <= report.true_bits <= 3.5
    assert report.widths is not None
    assert report.widths.true_bits == pytest.approx(report.true_bits)
    assert report.widths.uniform == "lm3:64"
    quantize(uneven, tmp_path / "one", format="lm3:64", solver="qlora")
    assert squared_error(uneven, tmp_path / "base") == pytest.approx(report.widths.error, rel=1e-3)
    assert squared_error(uneven, tmp_path / "one") == pytest.approx(report.widths.uniform_error, rel=1e-3)
    assert report.widths.error < report.widths.uniform_error / 2
    bits = {m.name: Format.parse(m.format).bits for m in report.matrices}
    assert all(bits[name] == 4 for name in bits if ".layers.1." in name)
    written = json.loads((tmp_path / "base" / "bitloft_report.json").read_text())
    assert written["widths"] == asdict(report.widths)


def test_options_of_an_allocation_resolve_to_it() -> None:
    """Also where one module's path is the end of another's."""
    formats = {"a.proj": "lm2:64", "b.a.proj": "lm4:64", "c": "lm4:64", "d": "lm4:64", "x.d": "lm3:64"}
    options = widths._with_formats(QuantizeOptions(), formats)
    assert {name: plan.format for name, plan in resolve(formats, options).items()} == formats
    assert options.format == "lm4:64"


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gpt2", {}), ("mixtral", {}), ("bart", {}), ("qwen2", {"embeddings": True, "head": True})],
)
def test_every_kind_of_module_takes_part(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Conv1D is measured as it is packed, a layer's experts and a tied table once."""
    make(name).save_pretrained(tmp_path / "model")
    report = quantize(tmp_path / "model", tmp_path / "base", target_bits=3.0, solver="qlora", **settings)
    assert report.widths is not None
    assert report.widths.true_bits == pytest.approx(report.true_bits, rel=1e-6)
    assert 2.25 < report.true_bits <= 3.0
    assert len({m.format for m in report.matrices}) > 1


def test_the_papers_rule_and_patterns_on_the_command_line(uneven: Path, tmp_path: Path) -> None:
    """The first half of the layers at 4 bits, the rest at 2: 3 payload bits, as LoftQ's table 5 counts them."""
    flags = ["--first-layers", "2=nf4:64", "--rest", "nf2:64", "--rank", "4", "--rank-for", "q_proj=2"]
    flags += ["--rank-for", "k_proj=0", "--alpha-for", "q_proj=8", "--steps", "auto"]
    done = CliRunner().invoke(app, ["quantize", str(uneven), "--out", str(tmp_path / "base"), *flags])
    assert done.exit_code == 0, done.output
    assert "nf4:64 (14), nf2:64 (14)" in done.stdout
    report = json.loads((tmp_path / "base" / "bitloft_report.json").read_text())
    assert report["payload_bits"] == 3.0
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    original = load_file(uneven / "model.safetensors")
    layers = quant_linears(model)
    for row in report["matrices"]:
        layer = layers[row["name"]]
        rank = 2 if "q_proj" in row["name"] else 0 if "k_proj" in row["name"] else 4
        assert (layer.rank, layer.scaling) == (rank, 4.0 if rank == 2 else float(rank > 0))
        weight = original[f"{row['name']}.weight"].float()
        error = float((weight - layer.dense()).norm() / weight.norm())
        assert error == pytest.approx(row["error_after"], rel=1e-4)
        assert row["error_after"] < row["error_before"] or not rank


def test_the_command_line_tells_what_a_target_came_to(uneven: Path, tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path / "base"), "--target-bits", "3.5", "--rank", "2"]
    done = CliRunner().invoke(app, ["quantize", str(uneven), *flags], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert "target 3.5: squared error" in done.stdout
    assert "not checked on text (give --check-text)" in done.stdout


def test_without_a_target_nothing_happens(uneven: Path) -> None:
    options = QuantizeOptions()
    assert widths.choose_widths(open_source(str(uneven)), options) == (options, None)


@pytest.mark.parametrize(("better", "kept"), [(True, "allocated"), (False, "uniform")])
def test_widths_are_kept_only_where_text_says_so(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool, kept: str
) -> None:
    found = {True: 10.0, False: 12.0}
    monkeypatch.setattr(widths, "_perplexity", lambda source, options, text: found[bool(options.rules) == better])
    report = quantize(uneven, tmp_path / "base", target_bits=3.5, check_text="text.txt", rank=2)
    assert report.widths is not None
    assert report.widths.kept == kept
    assert {report.widths.perplexity, report.widths.uniform_perplexity} == {10.0, 12.0}
    assert (len({m.format for m in report.matrices}) > 1) == better
    assert f"{kept} kept" in console._widths(report.widths)


def test_the_perplexity_is_that_of_the_written_base(uneven: Path, tmp_path: Path) -> None:
    from bitloft.evaluate import evaluate

    text = tmp_path / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    report = quantize(uneven, tmp_path / "base", target_bits=3.5, check_text=str(text), rank=4)
    assert report.widths is not None
    assert report.widths.perplexity is not None
    assert report.widths.uniform_perplexity is not None
    measured = evaluate(tmp_path / "base", text, length=256).perplexity
    expected = min(report.widths.perplexity, report.widths.uniform_perplexity)
    assert measured == pytest.approx(expected, rel=1e-4)
    assert report.widths.perplexity != report.widths.uniform_perplexity


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_bits": 1.5}, r"target_bits 1\.5 is out of reach; these matrices take from 2\."),
        ({"target_bits": 6.0}, r"target_bits 6\.0 is out of reach"),
        ({"target_bits": 2.5, "format": "sign:128"}, "sign codes have one only"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(
    uneven: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        quantize(uneven, tmp_path / "base", **settings)
    assert not (tmp_path / "base").exists()


def test_models_without_a_perplexity_are_refused_before_any_work(uneven: Path, tmp_path: Path) -> None:
    source = open_source(str(uneven))
    (tmp_path / "bert").mkdir()
    for file in uneven.iterdir():
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    config = json.loads((uneven / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    options = QuantizeOptions(target_bits=3.0, check_text="a.txt")
    with pytest.raises(OptionError, match="a decoder's perplexity, which BertModel does not have"):
        widths.choose_widths(open_source(str(tmp_path / "bert")), options)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(OptionError, match="a GGUF file cannot be checked"):
        widths.choose_widths(open_source(str(tmp_path / "a.gguf")), options)
    assert source.gguf is None


def test_nan_is_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.mlp\.up_proj holds NaN"):
        quantize(folder, tmp_path / "base", target_bits=3.0)


@pytest.mark.parametrize("fisher", [False, True])
def test_widths_are_chosen_by_the_calibrated_error_and_tried(uneven: Path, tmp_path: Path, fisher: bool) -> None:
    """The report's errors are those of one round at the widths that it names, and the check is of finished bases."""
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 30, encoding="utf-8")
    given: dict[str, Any] = {"solver": "calibrated", "rank": 4, "calibrate": str(text), "samples": 8}
    given |= {"calibrate_length": 32, "rounds": 1, "sweeps": 0, "format": "lm2:64", "fisher": fisher}
    report = quantize(uneven, tmp_path / "base", target_bits=3.0, check_text=str(text), **given)
    found = report.widths
    assert found is not None
    assert found.counted == ("loss" if fisher else "outputs")
    assert report.true_bits <= 3.0
    assert found.error < found.uniform_error
    assert found.perplexity is not None
    assert found.uniform_perplexity is not None
    measured = widths.perplexity_of(tmp_path / "base", str(text))
    assert measured == pytest.approx(min(found.perplexity, found.uniform_perplexity), rel=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "text.txt"]
    if not fisher:  # the sum over matrices of what their own reports say, but for the inputs behind quantized blocks
        first = [m for m in report.matrices if ".layers.0." in m.name and "q_proj" in m.name]
        assert first[0].calibrated is not None
        assert 0 < first[0].calibrated["after"] < 1
