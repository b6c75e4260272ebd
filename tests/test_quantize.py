"""The quantize verb on tiny models: a complete directory, true figures, clear refusals, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitloft
from bitloft.checkpoint import read_manifest
from bitloft.errors import BitloftError, CheckpointError, FormatError, OptionError
from bitloft.integrations.loading import load
from bitloft.modules.linear import quant_linears
from bitloft.quantize import quantize
from tests.helpers import tiny_llama


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bases") / "lm2"
    quantize(tiny_model, out, format="lm2:64", rank=4)
    return out


def test_the_directory_is_complete_and_the_report_true(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    seen: list[tuple[int, int, str]] = []
    report = quantize(tiny_model, out, format="nf2:64", rank=4, progress=lambda *a: seen.append(a))
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "generation_config.json", "README.md", "manifest.json", "bitloft_report.json"}  # fmt: skip
    assert wanted <= {p.name for p in out.iterdir()}
    assert [done for done, _, _ in seen] == list(range(1, 15))
    stored = load_file(out / "model.safetensors")
    for matrix in report.matrices:
        assert matrix.error_after < matrix.error_before
        names = ("weight", "weight_scales", "weight_exponent")
        found = sum(stored[f"{matrix.name}.{n}"].nbytes for n in names)
        assert found == matrix.bytes
        starts = sum(t.nbytes for k, t in stored.items() if k.startswith((f"{matrix.name}.a0", f"{matrix.name}.b0")))
        assert starts == matrix.start_bytes
    packed = sum(m.bytes + m.start_bytes for m in report.matrices)
    assert sum(t.nbytes for t in stored.values()) == packed + report.embedding_bytes + report.other_bytes
    assert report.true_bits == pytest.approx(8 * sum(m.bytes for m in report.matrices) / report.weights)
    assert report.left["lm_head"] == "output head is kept in 16 bit"
    assert read_manifest(out, "base")["fingerprint"] == report.fingerprint
    assert json.loads((out / "bitloft_report.json").read_text())["true_bits"] == report.true_bits


@pytest.mark.parametrize("settings", [{"alpha": 4.0}, {"alpha": 8.0}, {"alpha": 1.0}, {"rslora": True}])
def test_a_loaded_model_shows_the_reported_error(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Alpha = r, 2r, r/4 and rslora: the factor is in the base's own start, and nowhere lost (peft#1982)."""
    report = quantize(tiny_model, tmp_path / "base", format="nf2:64", rank=4, **settings)
    dense = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    layers = quant_linears(load(tmp_path / "base"))
    for matrix in report.matrices:
        weight = dense[f"{matrix.name}.weight"].detach()
        error = torch.linalg.vector_norm(weight - layers[matrix.name].dense()) / torch.linalg.vector_norm(weight)
        assert float(error) == pytest.approx(matrix.error_after, rel=1e-4)


def test_the_same_bytes_come_out_twice(tiny_model: Path, tiny_base: Path, tmp_path: Path) -> None:
    again = quantize(tiny_model, tmp_path / "again", format="lm2:64", rank=4)
    assert again.fingerprint == read_manifest(tiny_base, "base")["fingerprint"]


def test_a_fresh_process_gives_equal_logits(tiny_base: Path) -> None:
    ids = torch.arange(2, 22).unsqueeze(0)
    with torch.no_grad():
        here = load(tiny_base)(ids).logits
    code = (
        "import sys, torch, bitloft; torch.set_num_threads(1)\n"
        "with torch.no_grad(): y = bitloft.load(sys.argv[1])(torch.arange(2, 22).unsqueeze(0)).logits\n"
        "sys.stdout.buffer.write(y.numpy().tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_base)], capture_output=True, check=True)
    assert done.stdout == here.numpy().tobytes()


def test_qlora_stores_no_start(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "q", format="nf4:64", solver="qlora")
    assert report.true_bits_with_start == report.true_bits == pytest.approx(4.25, abs=0.5)
    assert not any(".a0" in key for key in load_file(tmp_path / "q" / "model.safetensors"))


def test_target_and_skip(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "t", rank=2, target=("mlp.*",), skip=("layers.1.*",))
    assert {m.name for m in report.matrices} == {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert report.left["model.layers.0.self_attn.q_proj"] == "does not match target"


def test_a_model_with_biases(tmp_path: Path) -> None:
    """Qwen2 has biases on q, k and v: they stay as they are."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    dense = Qwen2ForCausalLM(config)
    with torch.no_grad():
        dense.model.layers[0].self_attn.q_proj.bias.normal_()
    dense.save_pretrained(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "q", rank=2)
    loaded = load(tmp_path / "q")
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.bias, dense.model.layers[0].self_attn.q_proj.bias)


def refused(model: Path | str, out: Path, **settings: Any) -> str:
    with pytest.raises(BitloftError) as caught:
        quantize(model, out, **settings)
    assert not out.exists()
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")] == []
    return str(caught.value)


def test_bad_input_has_a_sentence_each(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "format nf5:64: no nf code of 5 bits exists" in refused(tiny_model, out, format="nf5:64")
    assert "rank 33 exceeds min(m, n) = 32 of model.layers.0.self_attn.k_proj" in refused(tiny_model, out, rank=33)
    assert "unknown solver 'lofq'" in refused(tiny_model, out, solver="lofq")
    assert "does not exist" in refused(tmp_path / "none", out)
    assert "holds no weights" in refused(_copy(tiny_model, tmp_path / "empty", drop="model.safetensors"), out)
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    assert "only as a pickle (pytorch_model.bin)" in refused(tmp_path / "empty", out)
    assert "no config.json" in refused(_copy(tiny_model, tmp_path / "bare", drop="config.json"), out)


def _copy(model: Path, to: Path, drop: str) -> Path:
    shutil.copytree(model, to)
    (to / drop).unlink()
    return to


def test_nan_names_its_tensor(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "tensor model.layers.1.mlp.up_proj holds NaN" in refused(model, tmp_path / "out", rank=2)


def test_trainers_arguments_are_never_opened(tmp_path: Path) -> None:
    """A poisoned training_args.bin beside the weights: listed as ignored, its code does not run."""
    model = tiny_llama(tmp_path / "m")
    marker = tmp_path / "ran"
    (model / "training_args.bin").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    report = quantize(model, tmp_path / "out", rank=2)
    assert report.ignored == ("training_args.bin",)
    assert not marker.exists()


def test_a_base_is_not_quantized_again(tiny_base: Path, tmp_path: Path) -> None:
    assert "quantized already" in refused(tiny_base, tmp_path / "out")


def test_an_existing_directory_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(tiny_model, tmp_path / "out")


def test_a_killed_run_leaves_nothing_and_the_next_one_is_clean(tiny_model: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from bitloft.quantize import quantize\n"
        "def kill(done, total, name):\n    if done == 5: os.kill(os.getpid(), 9)\n"
        "quantize(sys.argv[1], sys.argv[2], rank=2, progress=kill)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_model), str(tmp_path / "out")], check=False)
    assert not (tmp_path / "out").exists()
    quantize(tiny_model, tmp_path / "out", rank=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this sandbox cannot mount")
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            quantize(tiny_model, small / "out", rank=4)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_options_do_not_travel_silently(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ranks"):
        quantize(tiny_model, tmp_path / "out", ranks=4)
    with pytest.raises(FormatError):
        bitloft.Format.parse("lm9:64")
    with pytest.raises(OptionError, match="alpha is -1"):
        quantize(tiny_model, tmp_path / "out", alpha=-1.0)
