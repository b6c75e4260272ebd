"""merge.py: what a merged base computes, what the report says of it, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from bitloft.checkpoint import read_json, read_manifest
from bitloft.compress import compress
from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.evaluate import evaluate
from bitloft.factors import read_factors
from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record
from bitloft.merge import merge
from bitloft.modules.linear import quant_linears
from bitloft.quantize import quantize
from tests.helpers import WORDS, make_adapter

LENGTH = 64
SKIPPED = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bits, a start of rank 4 with a scaling of 2, one linear left dense."""
    out = tmp_path_factory.mktemp("merge") / "base"
    quantize(tiny_model, out, format="lm2:32", rank=4, alpha=8.0, steps=2, skip=("layers.1.mlp.up_proj",))
    return out


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return of_base(tmp_path / "adapter", base, scale=0.01)


def of_base(directory: Path, base: Path, scale: float) -> Path:
    """A random adapter that names ``base``."""
    made = make_adapter(directory, rank=2, alpha=4, scale=scale)
    record = {"schema": 1, "base": base_record(base).fingerprint, "source": None, "start": "frozen"}
    (made / "bitloft_adapter.json").write_text(json.dumps(record), encoding="utf-8")
    return made


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
    return tmp_path / "words.txt"


def only(adapter: Path, *modules: str) -> Path:
    """Leave the factors of these modules alone in an adapter."""
    file = adapter / "adapter_model.safetensors"
    kept = {k: t for k, t in load_file(file).items() if any(m in k for m in modules)}
    save_file(kept, file, metadata={"format": "pt"})
    return adapter


def test_new_codes_stand_for_the_sum_as_nearly_as_the_report_says(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, adapter, tmp_path / "out")
    pairs, before, after = read_factors(adapter).pairs, load(base), load(tmp_path / "out")
    assert len(report.matrices) == 14
    for matrix in report.matrices:
        if matrix.name == SKIPPED:
            continue
        delta = pairs[matrix.name].product()
        target = quant_linears(before)[matrix.name].dense() + delta
        lost = float(torch.linalg.vector_norm(target - quant_linears(after)[matrix.name].dense()))
        assert matrix.change == pytest.approx(lost / float(target.norm()), rel=1e-4)
        assert matrix.of_adapter == pytest.approx(lost / float(delta.norm()), rel=1e-4)
        assert 0 < matrix.change < 0.5
        layer = quant_linears(after)[matrix.name]
        assert (layer.rank, layer.scaling, str(layer.format)) == (4, 2.0, "lm2:32")


def test_kept_codes_lose_less_and_keep_every_code(base: Path, adapter: Path, tmp_path: Path) -> None:
    new = {m.name: m.change for m in merge(base, adapter, tmp_path / "new").matrices}
    kept = merge(base, adapter, tmp_path / "kept", codes="kept")
    before, after = quant_linears(load(base)), quant_linears(load(tmp_path / "kept"))
    for matrix in kept.matrices:
        if matrix.name == SKIPPED:
            continue
        assert torch.equal(before[matrix.name].weight, after[matrix.name].weight)
        assert after[matrix.name].rank == 6  # 4 of the start, 2 of the adapter
        assert matrix.change < new[matrix.name] / 3
        assert matrix.of_adapter < 0.2  # the adapter's factors rounded to 4 bits


def test_losses_are_those_of_evaluate(base: Path, words: Path, tmp_path: Path) -> None:
    adapter = of_base(tmp_path / "small", base, scale=0.01)
    report = merge(base, adapter, tmp_path / "out", codes="kept", data=words, length=LENGTH)
    assert report.loss_base == pytest.approx(evaluate(base, words, length=LENGTH).loss)
    assert report.loss_before == pytest.approx(evaluate(base, words, adapter, length=LENGTH).loss)
    assert report.loss_after == pytest.approx(evaluate(tmp_path / "out", words, length=LENGTH).loss)
    ids = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        plain, merged = load(base)(ids).logits, load(tmp_path / "out")(ids).logits
        adapted = PeftModel.from_pretrained(load(base), adapter)(ids).logits
    moved, lost = torch.linalg.vector_norm(adapted - plain), torch.linalg.vector_norm(merged - adapted)
    assert lost < moved / 3


def test_what_is_not_adapted_keeps_every_byte(base: Path, adapter: Path, tmp_path: Path) -> None:
    touched = "layers.0.self_attn.q_proj"
    report = merge(base, only(adapter, touched), tmp_path / "out")
    assert [m.name for m in report.matrices] == [f"model.{touched}"]
    assert report.untouched == 12
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert set(before) - same <= {name for name in before if touched in name}
    assert f"model.{touched}.weight" not in same


def test_a_linear_in_16_bit_is_added_to(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, only(adapter, "layers.1.mlp.up_proj"), tmp_path / "out")
    (matrix,) = report.matrices
    assert (matrix.format, matrix.rank) == ("float32", 0)
    assert matrix.change < 1e-6
    expected = load(base).get_submodule(SKIPPED).weight + read_factors(adapter).pairs[SKIPPED].product()
    torch.testing.assert_close(load(tmp_path / "out").get_submodule(SKIPPED).weight, expected)


def test_packed_adapters_merge_too(base: Path, adapter: Path, tmp_path: Path) -> None:
    compress(adapter, tmp_path / "packed", bits=6.0)
    report = merge(base, tmp_path / "packed", tmp_path / "out", codes="kept", rank=8)
    assert {m.rank for m in report.matrices} == {0, 6}  # at most what start and adapter hold; 0 in 16 bit
    pair = read_factors(tmp_path / "packed").pairs[report.matrices[0].name]
    name = report.matrices[0].name
    target = quant_linears(load(base))[name].dense() + pair.product()
    torch.testing.assert_close(quant_linears(load(tmp_path / "out"))[name].dense(), target, atol=2e-2, rtol=0)


def test_a_lower_rank_keeps_the_leading_components(base: Path, adapter: Path, tmp_path: Path) -> None:
    changes = []
    for rank in (3, 5, 6):
        report = merge(base, adapter, tmp_path / f"out{rank}", codes="kept", rank=rank)
        changes.append({m.name: m.change for m in report.matrices if m.name != SKIPPED})
        assert {m.rank for m in report.matrices} == {0, rank}
    assert all(changes[0][name] > changes[1][name] > changes[2][name] for name in changes[0])


def test_modules_that_a_packed_adapter_dropped_keep_their_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    zero = {k: t * ("q_proj" in k) for k, t in load_file(file).items()}
    save_file(zero, file, metadata={"format": "pt"})
    compress(adapter, tmp_path / "packed", bits=4.0)
    report = merge(base, tmp_path / "packed", tmp_path / "out")
    assert {m.name.rpartition(".")[2] for m in report.matrices} == {"q_proj"}
    assert report.untouched == 11


def test_the_result_is_a_whole_base_with_its_own_fingerprint(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, adapter, tmp_path / "out", rank=0, format="lm4:64")
    out = tmp_path / "out"
    record = base_record(out, verify=True)
    assert record.fingerprint == report.fingerprint != base_record(base).fingerprint
    assert record.source is None  # it stands for no source model any more
    assert read_manifest(out, "base")["merged"]["base"] == base_record(base).fingerprint
    assert {f.name for f in base.iterdir()} - {"bitloft_times.json"} == {f.name for f in out.iterdir()}
    assert "merged in" in (out / "README.md").read_text(encoding="utf-8")
    layer = quant_linears(load(out))["model.layers.0.mlp.up_proj"]
    assert (layer.rank, str(layer.format)) == (0, "lm4:64")
    matrices = read_json(out / "bitloft_report.json")["matrices"]
    assert not any("error_after" in m for m in matrices)
    # an adapter of the old base is refused by the new one, and merges again into nothing else
    with pytest.raises(AdapterError, match="was trained for another base"):
        merge(out, adapter, tmp_path / "again")


def test_merging_an_adapter_that_changes_nothing_changes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(t) for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    report = merge(base, adapter, tmp_path / "out", codes="kept")
    assert all(m.of_adapter == 0 and m.change < 1e-6 for m in report.matrices)  # the start is not rounded again


def test_bad_input_is_a_sentence(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="rank 33 exceeds"):
        merge(base, adapter, out, rank=33)
    with pytest.raises(OptionError, match="rank 0 leaves no start"):
        merge(base, adapter, out, codes="kept", rank=0)
    with pytest.raises(OptionError, match="asks for new codes"):
        merge(base, adapter, out, codes="kept", format="lm4:64")
    with pytest.raises(OptionError, match="unknown codes 'old'"):
        merge(base, adapter, out, codes="old")
    with pytest.raises(CheckpointError, match="is not a bitloft base"):
        merge(adapter.parent, adapter, out) if (adapter.parent / "config.json").exists() else merge(
            dense_copy(base, tmp_path), adapter, out
        )
    assert not out.exists()
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        merge(base, adapter, out)


def dense_copy(base: Path, tmp_path: Path) -> Path:
    """The base with a config that says nothing of quantization."""
    copy = tmp_path / "dense"
    shutil.copytree(base, copy)
    config = read_json(copy / "config.json")
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def test_adapters_that_do_not_fit_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    file, out = adapter / "adapter_model.safetensors", tmp_path / "out"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]

    def write(module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        pair = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        save_file(pair, file, metadata={"format": "pt"})

    write("model.layers.7.self_attn.q_proj", a, b)
    with pytest.raises(AdapterError, match=r"adapts model\.layers\.7\.self_attn\.q_proj, which the base does not have"):
        merge(base, adapter, out)
    write("model.layers.0.self_attn.q_proj", a[:, :32].contiguous(), b)
    with pytest.raises(AdapterError, match=r"as \(64, 32\); in this base it is \(64, 64\)"):
        merge(base, adapter, out)
    write("model.layers.0.input_layernorm", a, b)
    with pytest.raises(AdapterError, match="which is a LlamaRMSNorm; only linears"):
        merge(base, adapter, out)
    rows = load(base).get_output_embeddings().weight.shape[0]
    write("lm_head", a, torch.ones(rows, 2))
    with pytest.raises(AdapterError, match="lm_head shares its weight with another module"):
        merge(base, adapter, out)
    assert not out.exists()


def test_progress_names_each_matrix(base: Path, adapter: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    merge(base, adapter, tmp_path / "out", progress=lambda *said: told.append(said))
    assert [done for done, _, _ in told] == list(range(1, 15))
    assert math.prod({total for _, total, _ in told}) == 14
