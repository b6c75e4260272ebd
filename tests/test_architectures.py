"""Every architecture: quantized, saved, reloaded bit-equal, adapted by PEFT; nothing left alone without a reason."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import bitloft
from bitloft.integrations.loading import load
from bitloft.integrations.packing import packed_names
from bitloft.integrations.transformers import BitloftConfig
from bitloft.modules.embedding import TiedHead
from bitloft.modules.experts import projections
from bitloft.modules.linear import QuantConv1D
from bitloft.modules.select import Selection, select_modules
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from tests.architectures import MIXTURES, MODELS, inputs, make
from tests.helpers import shared

bitloft.register()
TIED = ("qwen2", "gemma", "gemma3", "gpt2", "bert", "albert", "bart", "t5", "whisper")
CLASSIFIERS = ("bert_classifier", "roberta", "deberta_v3", "distilbert")


def on_load(name: str, directory: Path, **settings: object) -> PreTrainedModel:
    """The tiny model quantized while it is loaded."""
    model = make(name)
    model.save_pretrained(directory)
    config = BitloftConfig(QuantizeOptions(format="lm4:64", rank=4, steps=1, **settings))  # type: ignore[arg-type]
    loaded: PreTrainedModel = type(model).from_pretrained(directory, quantization_config=config, dtype=torch.float32)
    return loaded.eval()


def output(model: nn.Module, name: str) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        y: Tensor = model(**inputs(name))[0]
    return y


def everything(name: str) -> dict[str, bool]:
    return {"embeddings": True, "head": name not in CLASSIFIERS}


@pytest.mark.parametrize("name", MODELS)
def test_all_of_it_packed_saved_reloaded_and_adapted(name: str, tmp_path: Path) -> None:
    model = on_load(name, tmp_path / "dense", **everything(name))
    y = output(model, name)
    assert bool(torch.isfinite(y).all())
    model.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert torch.equal(output(again, name), y)
    assert set(packed_names(again)) == set(model.config.quantization_config.modules)
    _adapts(again, name)
    dense = model.dequantize(torch.float32)
    torch.testing.assert_close(output(dense, name), y, rtol=1e-3, atol=1e-4)
    assert not packed_names(dense)
    assert {n: type(m) for n, m in dense.named_modules()} == {n: type(m) for n, m in make(name).named_modules()}


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT 0.21 warns of its own doing: names that transformers drops, patterns that it adds for experts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def _adapts(model: PreTrainedModel, name: str) -> None:
    with quiet_peft():
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.train()
    adapted(**inputs(name))[0].float().square().mean().backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
    assert trained
    unseen = [n for n, grad in trained.items() if grad is None or not bool(grad.abs().sum() > 0)]
    assert not unseen


@pytest.mark.parametrize("name", MODELS)
def test_the_verb_gives_the_bytes_of_quantizing_on_load(name: str, tmp_path: Path) -> None:
    model = on_load(name, tmp_path / "dense")
    report = quantize(tmp_path / "dense", tmp_path / "base", format="lm4:64", rank=4, steps=1)
    base = load(tmp_path / "base")
    ours, theirs = model.state_dict(), base.state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert {m.name for m in report.matrices} == set(model.hf_quantizer.errors)
    assert all(m.error_after < 0.12 for m in report.matrices)
    assert report.left == model.hf_quantizer.left


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("whole", [False, True])
def test_every_matrix_is_chosen_or_left_with_a_reason(name: str, whole: bool) -> None:
    model = make(name)
    found = select_modules(model, QuantizeOptions(**everything(name) if whole else {}))  # type: ignore[arg-type]
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner = path.rpartition(".")[0]
        if parameter.dim() >= 2 and parameter.numel() > 1024:
            assert {path, owner} & (found.chosen.keys() | found.left.keys()), path
    assert all(len(reason) > 10 for reason in found.left.values())
    heads = [n for n, reason in found.left.items() if reason == "output head is kept in 16 bit"]
    assert len(heads) == (0 if whole or name in CLASSIFIERS else 1)


def selection(name: str, **settings: object) -> Selection:
    return select_modules(make(name), QuantizeOptions(**settings))  # type: ignore[arg-type]


def test_what_is_chosen_in_some() -> None:
    assert set(selection("gpt2").chosen.values()) == {"conv1d"}
    assert [n for n in selection("albert").chosen if "albert_layers" in n and n.endswith("query")] == [
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    ]  # three layers, one module: solved once
    t5 = selection("t5").chosen
    assert all(f"{side}.block.0.layer.{i}.DenseReluDense.wo" in t5 for side, i in (("encoder", 1), ("decoder", 2)))
    left = selection("whisper").left
    assert left["model.encoder.conv1"] == "Conv1d is kept in 16 bit"
    for name in MIXTURES:
        experts = [n for n, kind in selection(name).chosen.items() if kind == "experts"]
        assert experts == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
        assert "Router is kept in 16 bit" in " ".join(selection(name).left.values())
        assert len(projections(make(name).get_submodule("model.layers.0.mlp.experts"))) == 2
    for name in ("bert_classifier", "roberta"):
        assert not [n for n in selection(name).chosen if "pooler" in n or "classifier" in n]


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_stays_one_matrix(name: str, tmp_path: Path) -> None:
    model = on_load(name, tmp_path / "dense", **everything(name))
    head = model.get_output_embeddings()
    assert isinstance(head, TiedHead)
    assert head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert sum(kind == "embedding" for kind in packed_names(model).values()) == 1


def test_a_classifier_that_the_class_makes_fresh_is_not_quantized(tmp_path: Path) -> None:
    """RoBERTa's head is two linears that a headless checkpoint lacks: packed, they would be noise."""
    from transformers import RobertaForSequenceClassification, RobertaModel

    make("roberta").roberta.save_pretrained(tmp_path / "m")
    config = BitloftConfig(QuantizeOptions(rank=4, steps=1))
    model = RobertaForSequenceClassification.from_pretrained(tmp_path / "m", quantization_config=config, num_labels=3)
    assert type(model.classifier.dense) is nn.Linear
    assert float(model.classifier.dense.weight.detach().std()) > 0
    assert len(packed_names(model)) == 6
    headless = RobertaModel.from_pretrained(tmp_path / "m", quantization_config=config)
    assert set(packed_names(headless)) == {n.removeprefix("roberta.") for n in packed_names(model)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t5_computes_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers keeps ``wo`` in float32 and casts activations to its dtype, unless it is int8."""
    model = on_load("t5", tmp_path / "dense")
    model.save_pretrained(tmp_path / "base")
    half = type(model).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    assert half.get_parameter(wo).dtype == torch.int8
    assert torch.equal(half.get_parameter(wo), model.get_parameter(wo))
    y = output(half, "t5")
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), output(model, "t5"), rtol=0.1, atol=0.1)


def test_gpt2_adapters_move_between_dense_and_packed(tmp_path: Path) -> None:
    """PEFT saves fan_in_fan_out for a Conv1D; on the packed layer the same tensors mean the same."""
    from peft import PeftModel

    dense = make("gpt2")
    dense.save_pretrained(tmp_path / "dense")
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    with quiet_peft():
        adapted = get_peft_model(dense, config)
        adapted.save_pretrained(tmp_path / "adapter")
        delta = output(adapted, "gpt2") - output(make("gpt2"), "gpt2")
        packed = (
            type(dense)
            .from_pretrained(
                tmp_path / "dense", quantization_config=BitloftConfig(QuantizeOptions(rank=16, format="nf4:64"))
            )
            .eval()
        )
        before = output(packed, "gpt2")
        assert isinstance(packed.transformer.h[0].attn.c_attn, QuantConv1D)
        assert packed.transformer.h[0].attn.c_attn.in_features == 64
        loaded = PeftModel.from_pretrained(packed, tmp_path / "adapter").eval()
    change = output(loaded, "gpt2") - before
    assert float((change - delta).norm() / delta.norm()) < 0.15


def test_a_real_bert(tmp_path: Path) -> None:
    root = os.environ.get("BITLOFT_MODELS")
    if not root or not (Path(root) / "minilm-l6").is_dir():
        pytest.skip("needs the folder minilm-l6 below BITLOFT_MODELS")
    from transformers import AutoModel

    folder, ids = Path(root) / "minilm-l6", torch.arange(1000, 1020).unsqueeze(0)
    config = BitloftConfig(QuantizeOptions(format="lm4:64", rank=8, steps=1))
    model = AutoModel.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert len(packed_names(model)) == 36
    assert "pooler" in " ".join(model.hf_quantizer.left)
    with torch.no_grad():
        ours, theirs = model(ids).last_hidden_state.mean(1), dense(ids).last_hidden_state.mean(1)
    assert float(torch.cosine_similarity(ours, theirs)) > 0.9


def test_a_real_bart(tmp_path: Path) -> None:
    folder = shared("models/bart-g2p-us")
    assert AutoConfig.from_pretrained(folder).model_type == "bart"
    report = quantize(folder, tmp_path / "base", format="lm4:64", rank=8, steps=1, embeddings=True, head=True)
    base = load(tmp_path / "base")
    assert len([m for m in report.matrices if m.name.startswith("model.")]) == len(report.matrices) == 17
    assert isinstance(base.lm_head, TiedHead)
    dense = type(base).from_pretrained(folder, dtype=torch.float32).eval()
    word = torch.tensor([[1, 9, 7, 22, 2]])
    with torch.no_grad():
        ours, theirs = base(word, decoder_input_ids=word).logits, dense(word, decoder_input_ids=word).logits
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.98
