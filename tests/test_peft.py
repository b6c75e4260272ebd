"""integrations/peft.py: what may sit on a packed base, where the trained start goes, and the sentences of refusal."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from bitloft.adapters import read_adapter
from bitloft.checkpoint import read_json
from bitloft.errors import AdapterError, OptionError
from bitloft.integrations.loading import load
from bitloft.integrations.peft import QuantLora, difference, fresh_adapter, register, save_adapter, start_adapter
from bitloft.modules.linear import QuantLinear, quant_linears
from bitloft.quantize import quantize

RECORD = {"base": "b" * 64, "source": "s" * 64, "start": "frozen"}
IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bits and an alpha of twice the rank, so that a lost s0 shows."""
    out = tmp_path_factory.mktemp("peft") / "base"
    quantize(tiny_model, out, format="lm2:32", rank=4, alpha=8.0)
    return out


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def disturb(model: PeftModel, seed: int = 0) -> None:
    """What training would do: every trainable weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_fresh_adapter_begins_as_the_base(base: Path) -> None:
    before = logits(load(base))
    adapted = fresh_adapter(load(base), rank=4, alpha=8)
    assert torch.equal(logits(adapted), before)
    layers = [m for m in adapted.modules() if isinstance(m, QuantLora)]
    assert len(layers) == len(quant_linears(adapted)) == 14
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all("lora_" in name for name in trainable)


def test_same_seed_same_adapter(base: Path) -> None:
    one, two, other = (fresh_adapter(load(base), rank=4, alpha=8, seed=s) for s in (1, 1, 2))
    pairs = [(dict(m.named_parameters())[_A]) for m in (one, two, other)]
    assert torch.equal(pairs[0], pairs[1])
    assert not torch.equal(pairs[0], pairs[2])


_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("targets", "count", "short"),
    [
        (("q_proj", "mlp.*"), 8, {"q_proj", "gate_proj", "up_proj", "down_proj"}),
        (("model.layers.1.*",), 7, None),
    ],
)
def test_targets_are_shell_patterns(base: Path, targets: tuple[str, ...], count: int, short: set[str] | None) -> None:
    adapted = fresh_adapter(load(base), rank=2, alpha=2, targets=targets)
    assert len([m for m in adapted.modules() if isinstance(m, QuantLora)]) == count
    written = adapted.peft_config["default"].target_modules
    assert written == short if short else len(written) == count


def test_bad_targets_and_ranks(base: Path) -> None:
    with pytest.raises(OptionError, match=r"target 'qkv' matches no linear layer; this model has down_proj, gate_proj"):
        fresh_adapter(load(base), rank=2, alpha=2, targets=("qkv",))
    with pytest.raises(OptionError, match=r"rank 40 is larger than .*k_proj of shape \(32, 64\) allows"):
        fresh_adapter(load(base), rank=40, alpha=2)


def test_start_adapter_gives_the_base_with_its_start(base: Path) -> None:
    """The start handed out as an adapter computes what the base with its start computes."""
    expected = logits(load(base))
    bare = logits(load(base, start="trainable"))
    adapted = start_adapter(load(base, start="trainable"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    assert (bare - expected).abs().max() > 100 * (logits(adapted) - expected).abs().max()


def test_start_adapter_needs_a_start_that_is_handed_out(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="load it with start='trainable'"):
        start_adapter(load(base))
    quantize(tiny_model, tmp_path / "bare", format="lm2:32", solver="qlora")
    with pytest.raises(AdapterError, match="quantized without a start"):
        start_adapter(load(tmp_path / "bare", start="trainable"))


def test_trained_start_is_saved_relative_to_the_base_with_its_start(base: Path, tmp_path: Path) -> None:
    adapted = start_adapter(load(base, start="trainable"))
    disturb(adapted)
    expected = logits(adapted)
    config = save_adapter(adapted, tmp_path, base="base", record=RECORD | {"start": "trainable"})
    assert (config.r, config.lora_alpha) == (8, 8)  # twice the start's rank
    reloaded = PeftModel.from_pretrained(load(base), tmp_path)  # the start frozen, as always
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-4)
    assert (logits(load(base)) - expected).abs().max() > 1e-2


def test_untrained_start_is_saved_as_nothing(base: Path, tmp_path: Path) -> None:
    config = save_adapter(
        start_adapter(load(base, start="trainable")), tmp_path, base="base", record=RECORD | {"start": "trainable"}
    )
    assert config.r == 1
    assert all(not bool(pair.b.any()) for pair in read_adapter(tmp_path).pairs)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ranks=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    near=st.booleans(),
)
def test_difference_is_exact_at_its_rank(seed: int, shape: tuple[int, int], ranks: tuple[int, int], near: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    r, r0 = ranks if not near else (ranks[0], ranks[0])
    a0, b0 = torch.randn(r0, shape[1], generator=generator), torch.randn(shape[0], r0, generator=generator)
    a, b = torch.randn(r, shape[1], generator=generator), torch.randn(shape[0], r, generator=generator)
    if near:  # a short training run: the difference is small against both terms
        a, b = a0 + 1e-3 * a, b0 + 1e-3 * b
    small_a, small_b = difference(a, b, 2.0, a0, b0, 2.0 if near else 0.5)
    expected = 2.0 * b.double() @ a.double() - (2.0 if near else 0.5) * b0.double() @ a0.double()
    assert len(small_a) == small_b.shape[1] <= min(r + r0, *shape)
    error = float((small_b.double() @ small_a.double() - expected).norm() / expected.norm())
    assert error < 1e-5


def test_files_are_pefts_and_ours(base: Path, tmp_path: Path) -> None:
    adapted = fresh_adapter(load(base), rank=4, alpha=8, rslora=True, dropout=0.1)
    disturb(adapted)
    save_adapter(adapted, tmp_path, base="the/base", record=RECORD)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "bitloft_adapter.json",
    }
    config = read_json(tmp_path / "adapter_config.json")
    assert config["base_model_name_or_path"] == "the/base"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    assert (config["init_lora_weights"], config["inference_mode"]) == (True, True)
    assert "_custom_modules" not in config
    assert read_json(tmp_path / "bitloft_adapter.json") == {"schema": 1, **RECORD}
    adapter = read_adapter(tmp_path)
    assert (adapter.base, adapter.source, len(adapter.pairs)) == (RECORD["base"], RECORD["source"], 14)
    assert {pair.scaling for pair in adapter.pairs} == {8 / 2}
    reloaded = PeftModel.from_pretrained(load(base), tmp_path)
    assert torch.equal(logits(reloaded), logits(adapted))


def test_nan_is_not_saved(base: Path, tmp_path: Path) -> None:
    adapted = fresh_adapter(load(base), rank=4, alpha=8)
    dict(adapted.named_parameters())[_A].data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight of the trained adapter holds NaN or infinity"):
        save_adapter(adapted, tmp_path, base="base", record=RECORD)


def test_merging_is_refused_and_changes_nothing(base: Path) -> None:
    adapted = fresh_adapter(load(base), rank=4, alpha=8)
    disturb(adapted)
    before = logits(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload, lambda: adapted.merge_and_unload(safe_merge=True)):
        with pytest.raises(AdapterError, match=r"cannot be merged into lm2:32 codes.*`bitloft compress`"):
            merge()
    with pytest.raises(AdapterError, match="nothing to unmerge"):
        adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), before)
    bare = adapted.unload()
    assert torch.equal(logits(bare), logits(load(base)))


@pytest.mark.parametrize(
    ("given_", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights='loftq'"),
    ],
)
def test_variants_that_read_the_weight_are_refused_by_name(base: Path, given_: dict[str, Any], name: str) -> None:
    register()
    with pytest.raises(AdapterError, match=rf"^{name} needs a dense weight"):
        get_peft_model(load(base), LoraConfig(r=4, target_modules="all-linear", **given_))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_other_beginnings_work(base: Path, init: Any) -> None:
    register()
    model = get_peft_model(load(base), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init))
    assert torch.isfinite(logits(model)).all()


def test_a_second_adapter_is_checked_too(base: Path) -> None:
    adapted = fresh_adapter(load(base), rank=4, alpha=8)
    with pytest.raises(AdapterError, match=r"^use_dora needs a dense weight"):
        adapted.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


def test_mixed_batch_through_peft(base: Path) -> None:
    adapted = fresh_adapter(load(base), rank=4, alpha=8)
    disturb(adapted, seed=1)
    alone = logits(adapted)
    plain = logits(load(base))
    adapted.eval()
    with torch.no_grad():
        mixed = adapted(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-5, atol=1e-5)


def test_registering_twice_changes_nothing() -> None:
    register()
    once = LoraConfig.__post_init__
    register()
    assert LoraConfig.__post_init__ is once
    assert LoraConfig()._custom_modules[QuantLinear] is QuantLora


def test_plain_linears_keep_merging(tiny_model: Path) -> None:
    """Our layer is for packed weights only: a dense model merges as before."""
    from transformers import AutoModelForCausalLM

    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = fresh_adapter(dense, rank=4, alpha=8)
    disturb(adapted)
    before = logits(adapted)
    with warnings.catch_warnings(action="error"):
        merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_an_encoder_takes_a_fresh_adapter() -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    adapted = fresh_adapter(BertModel(config), rank=2, alpha=2.0, targets=("query",))
    assert adapted.peft_config["default"].task_type == "FEATURE_EXTRACTION"
    assert adapted(input_ids=torch.arange(6).view(1, 6))[0].shape == (1, 6, 32)
