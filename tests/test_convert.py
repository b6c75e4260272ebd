"""convert.py: each target computes what it should without bitloft, and says what it lacks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from bitloft.checkpoint import read_json
from bitloft.convert import convert
from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.evaluate import evaluate
from bitloft.factors import read_factors
from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record
from bitloft.modules.linear import quant_linears
from bitloft.modules.multi import AdapterBank
from bitloft.quantize import quantize
from tests.architectures import inputs, make
from tests.helpers import WORDS, make_adapter, tiny_llama

IDS = torch.arange(3, 35).reshape(2, 16)
LENGTH = 64


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nf4 with a start of scaling 2; one linear left dense."""
    out = tmp_path_factory.mktemp("convert") / "base"
    quantize(tiny_model, out, format="nf4:32", rank=4, alpha=8.0, steps=2, skip=("layers.1.mlp.up_proj",))
    return out


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    made = make_adapter(tmp_path / "adapter", rank=2, alpha=4)
    record = {"schema": 1, "base": base_record(base).fingerprint, "source": None, "start": "frozen"}
    (made / "bitloft_adapter.json").write_text(json.dumps(record), encoding="utf-8")
    return made


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
    return tmp_path / "words.txt"


@torch.no_grad()
def logits(model: Any, adapter: Path | None = None) -> torch.Tensor:
    """With ``adapter`` attached as serving does it."""
    if adapter is None:
        return model(IDS).logits  # type: ignore[no-any-return]
    from bitloft.adapters import read_adapter

    bank = AdapterBank(model)
    bank.attach("a", read_adapter(adapter))
    with bank.rows(["a"] * len(IDS)):
        found: torch.Tensor = model(IDS).logits
    bank.detach("a")
    return found


def plain(directory: Path) -> Any:
    return loaded(AutoModelForCausalLM, directory)


def loaded(kind: Any, directory: Path) -> Any:
    """A model as transformers alone reads it, computing in float32."""
    model = kind.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' own kernel computes in bfloat16
    return model


def test_dense_computes_what_the_base_does(base: Path, tmp_path: Path) -> None:
    report = convert(base, tmp_path / "out", to="dense")
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(load(base)), atol=1e-5, rtol=1e-5)
    assert len(report.changes) == 13
    assert max(report.changes.values()) < 1e-6  # the tiny model is kept in float32
    assert {"tokenizer.json", "chat_template.jinja"} <= {f.name for f in (tmp_path / "out").iterdir()}


def test_dense_loads_where_bitloft_is_not(base: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out", to="dense")
    code = (
        "import sys; sys.modules['bitloft'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, len(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.split() == ["Linear", "320"], done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense_in_16_bit_reports_its_rounding(base: Path, tmp_path: Path, dtype: str) -> None:
    report = convert(base, tmp_path / "out", to="dense", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}
    for name, layer in quant_linears(load(base)).items():
        exact, found = layer.dense(), tensors[f"{name}.weight"].float()
        assert report.changes[name] == pytest.approx(float((exact - found).norm() / exact.norm()), rel=1e-4)
        assert 0 < report.changes[name] < 4e-3


def test_dense_takes_the_adapter_in(base: Path, adapter: Path, words: Path, tmp_path: Path) -> None:
    report = convert(base, tmp_path / "out", to="dense", adapter=adapter, data=words, length=LENGTH)
    expected = logits(load(base), adapter)
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, logits(load(base)), atol=1e-2)
    assert len(report.changes) == 14  # the linear that is not packed too
    assert report.losses["base"] == pytest.approx(evaluate(base, words, adapter, length=LENGTH).loss)
    assert report.losses["converted"] == pytest.approx(report.losses["base"], abs=1e-4)


def test_dense_refuses_a_dtype_that_overflows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = plain(tiny_llama(tmp_path / "m"))
    model.model.layers[0].mlp.up_proj.weight.data *= 1e7
    model.save_pretrained(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "base", format="lm4:32", rank=0)
    with pytest.raises(
        OptionError, match=r"layers\.0\.mlp\.up_proj\.weight holds values beyond float16; convert to bfloat16"
    ):
        convert(tmp_path / "base", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_portable_carries_the_task_to_the_original_model(
    base: Path, adapter: Path, tiny_model: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = convert(base, out, to="portable", adapter=adapter, source=tiny_model, data=words, length=LENGTH)
    pairs, given = read_factors(out).pairs, read_factors(adapter).pairs
    assert report.rank == 2
    for name, pair in given.items():
        torch.testing.assert_close(pairs[name].product(), pair.product())
    dense = {n: m.weight for n, m in plain(tiny_model).named_modules() if n in report.changes}
    for name, layer in quant_linears(load(base)).items():
        norm = float((dense[name] - layer.dense()).norm() / dense[name].norm())
        assert report.changes[name] == pytest.approx(norm, rel=1e-4)
    assert read_factors(out).base is None
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(tiny_model)
    assert report.losses["source"] == pytest.approx(evaluate(tiny_model, words, length=LENGTH).loss)
    assert report.losses["source with portable"] == pytest.approx(
        evaluate(tiny_model, words, out, length=LENGTH).loss, rel=1e-5
    )
    assert report.losses["base with adapter"] == pytest.approx(evaluate(base, words, adapter, length=LENGTH).loss)
    # plain PEFT computes W + s*B*A with it
    theirs = PeftModel.from_pretrained(plain(tiny_model), out).eval()
    torch.testing.assert_close(logits(theirs), logits(plain(tiny_model), adapter), atol=1e-4, rtol=1e-4)


def test_portable_takes_the_start_off_an_adapter_that_holds_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    """LoftQ as published trains B*A from B0*A0: the task is the difference, of rank 2r."""
    layers, task = quant_linears(load(base)), read_factors(adapter).pairs
    tensors = {}
    for name, pair in task.items():
        a, b = pair.a, pair.b
        if name in layers:
            a, b = torch.cat([layers[name].start_a(), a]), torch.cat([2.0 * layers[name].start_b(), b], dim=1)
        else:
            a, b = torch.nn.functional.pad(a, (0, 0, 0, 4)), torch.nn.functional.pad(b, (0, 4))
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 6, "lora_alpha": 6}), encoding="utf-8")
    report = convert(base, tmp_path / "out", to="portable", adapter=adapter, contains="start")
    assert report.notes == ("norms are those that quantize reported.",)
    reported = {m["name"]: m["error_after"] for m in read_json(base / "bitloft_report.json")["matrices"]}
    assert report.changes == {name: reported[name] for name in task if name in layers}
    pairs = read_factors(tmp_path / "out").pairs
    for name, pair in task.items():
        torch.testing.assert_close(pairs[name].product(), pair.product(), atol=1e-5, rtol=1e-4)


def test_bitsandbytes_loads_in_transformers_with_equal_logits(base: Path, words: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    report = convert(base, out, to="bitsandbytes", data=words, length=LENGTH)
    model = plain(out)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear  # what the base left dense
    codes = load(base)
    for layer in quant_linears(codes).values():
        layer.start_enabled = False
    torch.testing.assert_close(logits(model), logits(codes), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), logits(load(base)), atol=1e-3)
    # with the start beside it, through PEFT
    assert any("bitsandbytes has no place for a start" in note for note in report.notes)
    adapted = PeftModel.from_pretrained(model, out / "start").eval()
    torch.testing.assert_close(logits(adapted), logits(load(base)), atol=1e-4, rtol=1e-4)
    assert report.losses["converted"] == pytest.approx(report.losses["base"], abs=1e-2)
    assert set(report.changes.values()) == {0.0}


def test_bitsandbytes_takes_the_adapter_beside_the_start(base: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    report = convert(base, tmp_path / "out", to="bitsandbytes", adapter=adapter)
    assert report.rank == 6
    adapted = PeftModel.from_pretrained(plain(tmp_path / "out"), tmp_path / "out" / "start").eval()
    torch.testing.assert_close(logits(adapted), logits(load(base), adapter), atol=1e-4, rtol=1e-4)


def test_bitsandbytes_without_a_start_writes_no_adapter(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "base", format="nf4:32", solver="qlora")
    report = convert(tmp_path / "base", tmp_path / "out", to="bitsandbytes", dtype="float16")
    assert (report.rank, report.notes) == (None, ())
    assert not (tmp_path / "out" / "start").exists()
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"


def test_bitsandbytes_writes_dense_what_no_block_divides(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(tmp_path / "m", hidden=80)
    quantize(tmp_path / "m", tmp_path / "base", format="nf4:16", rank=2)
    report = convert(tmp_path / "base", tmp_path / "out", to="bitsandbytes")
    assert any("no block of bitsandbytes divides its rows of 80" in note for note in report.notes)
    adapted = PeftModel.from_pretrained(plain(tmp_path / "out"), tmp_path / "out" / "start").eval()
    torch.testing.assert_close(logits(adapted), logits(load(tmp_path / "base")), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose linears were Conv1D, transposed."""
    root = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(root / "model")
    quantize(root / "model", root / "base", format="nf4:32", rank=2, steps=1)
    return root / "base"


def test_conv1d_becomes_conv1d_again(gpt2: Path, tmp_path: Path) -> None:
    convert(gpt2, tmp_path / "out")
    dense = plain(tmp_path / "out")
    assert type(dense.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    torch.testing.assert_close(logits(dense), logits(load(gpt2)), atol=1e-5, rtol=1e-5)


def test_conv1d_goes_to_bitsandbytes(gpt2: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    convert(gpt2, tmp_path / "out", to="bitsandbytes")
    model = plain(tmp_path / "out")
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Linear4bit"
    adapted = PeftModel.from_pretrained(model, tmp_path / "out" / "start").eval()
    torch.testing.assert_close(logits(adapted), logits(load(gpt2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "t5", "deberta_v3", "albert", "phi"])
def test_every_architecture_goes_dense_and_to_bitsandbytes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make(name).save_pretrained(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "base", format="nf4:32", rank=2, steps=1)
    base, given = load(tmp_path / "base"), inputs(name)
    convert(tmp_path / "base", tmp_path / "dense")
    report = convert(tmp_path / "base", tmp_path / "bnb", to="bitsandbytes")
    assert any("wo is written dense: transformers keeps it in float32" in note for note in report.notes) == (
        name == "t5"
    )
    dense, exported = (loaded(type(base), tmp_path / kind) for kind in ("dense", "bnb"))
    adapted = PeftModel.from_pretrained(exported, tmp_path / "bnb" / "start").eval()
    with torch.no_grad():
        expected = base(**given).logits
        torch.testing.assert_close(dense(**given).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapted(**given).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_go_dense_alone(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "base", format="nf4:32", rank=2, steps=1)
    convert(tmp_path / "base", tmp_path / "out")
    base = load(tmp_path / "base")
    dense = loaded(type(base), tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(dense(**inputs(name)).logits, base(**inputs(name)).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(OptionError, match="is packed as experts, and bitsandbytes stores linears alone"):
        convert(tmp_path / "base", tmp_path / "bnb", to="bitsandbytes")


def test_a_packed_table_is_dense_again_but_not_bitsandbytes(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "base", format="nf4:32", rank=2, steps=1, embeddings=True, head=True)
    with pytest.raises(OptionError, match="is packed as embedding, and bitsandbytes stores linears alone"):
        convert(tmp_path / "base", tmp_path / "out", to="bitsandbytes")
    convert(tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(load(tmp_path / "base")), atol=1e-5, rtol=1e-5)


def test_other_formats_cannot_become_bitsandbytes(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "base", format="lm2:64", rank=2)
    with pytest.raises(OptionError, match="is stored as lm2:64, and bitsandbytes knows nf4 alone"):
        convert(tmp_path / "base", tmp_path / "out", to="bitsandbytes")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_a_sentence(base: Path, adapter: Path, tiny_model: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="unknown to 'gguf'; use one of dense, portable, bitsandbytes"):
        convert(base, out, to="gguf")
    with pytest.raises(OptionError, match="contains does not apply to dense"):
        convert(base, out, contains="start")
    with pytest.raises(OptionError, match="a portable adapter is float32"):
        convert(base, out, to="portable", dtype="float16", adapter=adapter)
    with pytest.raises(OptionError, match="a portable LoRA is made of an adapter; give one"):
        convert(base, out, to="portable")
    with pytest.raises(OptionError, match="source does not apply to dense"):
        convert(base, out, source=tiny_model)
    with pytest.raises(OptionError, match="name it as source"):
        convert(base, out, to="portable", adapter=adapter, data=words)
    with pytest.raises(CheckpointError, match="their fingerprints differ"):
        convert(base, out, to="portable", adapter=adapter, source=tiny_llama(tmp_path / "other", seed=5))
    (adapter / "bitloft_adapter.json").write_text(json.dumps({"schema": 1, "base": "f" * 64}), encoding="utf-8")
    with pytest.raises(AdapterError, match="was trained for another base"):
        convert(base, out, adapter=adapter)
    assert not out.exists()
