"""The mixed batch: every row answers with its own adapter, and the base stays the base."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from bitloft.adapters import Adapter, LoraPair, PackedAdapter, PackedBlock, PackedModule
from bitloft.errors import AdapterError
from bitloft.formats import Format
from bitloft.kernels.lora import Segment, Start, multi_lora_plain
from bitloft.kernels.ops import decode, encode
from bitloft.modules.linear import QuantLinear, replace_module
from bitloft.modules.multi import BASE, AdapterBank, install


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Float noise of another batch shape, no more."""
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def packed_adapter(
    model: nn.Module, modules: Sequence[str], *, seed: int = 0, rank: int = 4, scale: float = 0.3
) -> PackedAdapter:
    """Random factors for some modules, in two blocks of different width: 3 bits, then 2."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        blocks = []
        for fmt, k in (("lm3:row", rank - rank // 2), ("lm2:row", rank // 2)):
            a = torch.randn(k, linear.in_features, generator=generator)
            bt = torch.randn(k, linear.out_features, generator=generator) * scale
            blocks.append(PackedBlock(encode(a, fmt), encode(bt, fmt)))
        found[name] = PackedModule(name, linear.in_features, linear.out_features, tuple(blocks))
    empty = torch.zeros(0, dtype=torch.uint8)
    return PackedAdapter(
        path=Path("."), config={}, modules=found, base=None, source=None, payload=empty, true_bits=0.0,
        payload_bits=0.0, sha256=f"{seed:064x}",
    )  # fmt: skip


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    """The tiny Llama with one of its layers packed: an adapter must not care."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    name = "model.layers.0.mlp.up_proj"
    dense = model.get_submodule(name)
    layer = QuantLinear(dense.in_features, dense.out_features, Format.parse("nf4:64"))
    held = layer.packed_weight().tensors()
    for part, tensor in encode(dense.weight.detach(), "nf4:64").tensors().items():
        held[part].copy_(tensor)
    replace_module(model, name, layer)
    return model


@pytest.fixture
def bank(model: Any) -> AdapterBank:
    """Three adapters: one on everything, one on attention of rank 2, one on the last layer alone."""
    bank = AdapterBank(model)
    bank.attach("all", packed_adapter(model, linears(model), seed=1))
    bank.attach("attention", packed_adapter(model, [n for n in linears(model) if "attn" in n], seed=2, rank=2))
    bank.attach("last", packed_adapter(model, ["model.layers.1.mlp.down_proj"], seed=3, rank=6))
    install(model, bank)
    return bank


def ids(rows: int, length: int = 7) -> Tensor:
    return torch.randint(3, 200, (rows, length))


@torch.no_grad()
def test_a_row_equals_the_model_with_its_delta_in_the_weight(model: Any, bank: AdapterBank) -> None:
    adapter = packed_adapter(model, ["model.layers.0.self_attn.q_proj"], seed=9)
    bank.attach("one", adapter)
    tokens = ids(2)
    mixed = model(tokens, adapter_names=[BASE, "one"]).logits
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    base = model(tokens).logits
    for block in adapter.modules["model.layers.0.self_attn.q_proj"].blocks:
        linear.weight += decode(block.bt).T @ decode(block.a)
    merged = model(tokens).logits
    assert_close(mixed[0], base[0])
    assert_close(mixed[1], merged[1])
    assert (merged[1] - base[1]).abs().max() > 0.01  # else equality says nothing


NAMES = st.sampled_from(["all", "attention", "last", BASE, None])
SHAPES = [
    ["all"] * 5,  # one segment
    [BASE, None],  # no segment
    ["all", "attention", "last", BASE],  # all distinct
    ["all"] * 6 + ["last"],  # skewed
    ["all", "last", "all", None, "attention", "last", "all"],  # scattered rows
]


@torch.no_grad()
@pytest.mark.parametrize("names", SHAPES, ids=str)
def test_a_mixed_batch_equals_each_row_alone(model: Any, bank: AdapterBank, names: list[str | None]) -> None:
    tokens = ids(len(names))
    mixed = model(tokens, adapter_names=names).logits
    for i, name in enumerate(names):
        alone = model(tokens[i : i + 1], adapter_names=[name]).logits[0]
        assert_close(mixed[i], alone)
    distinct = {name or BASE for name in names}
    same = ids(1).expand(len(distinct), -1)
    answers = model(same, adapter_names=sorted(distinct)).logits
    for i in range(len(distinct)):
        for j in range(i):
            assert (answers[i] - answers[j]).abs().max() > 0.01


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=9), axes=st.integers(0, 2))
def test_any_mixture_on_one_layer(names: list[str | None], axes: int) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(12, 20)).eval()
    bank = AdapterBank(layer)
    adapters: dict[str | None, PackedAdapter] = {
        name: packed_adapter(layer, ["0"], seed=seed, rank=2 + seed)
        for seed, name in enumerate(("all", "attention", "last"))
    }
    for name, adapter in adapters.items():
        bank.attach(str(name), adapter)
    x = torch.randn(len(names), *[3] * axes, 12)
    with torch.no_grad(), bank.rows(names):
        y = layer(x)
    for i, name in enumerate(names):
        expected = layer(x[i])
        for block in adapters[name].modules["0"].blocks if name in adapters else ():
            expected = expected + (x[i] @ decode(block.a).T) @ decode(block.bt)
        assert_close(y[i], expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_equal_to_peft(tiny_model: Path) -> None:
    """PEFT's own mixed batch, given the factors that the packed ones decode to."""
    names = ["one", "two", BASE, "one"]
    ours = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    bank = AdapterBank(ours)
    targets = linears(ours)
    adapters = {"one": packed_adapter(ours, targets, seed=1), "two": packed_adapter(ours, targets, seed=2)}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config, adapter_name="one")
    theirs.add_adapter("two", config)
    for name, adapter in adapters.items():
        bank.attach(name, adapter)
        for path, module in adapter.modules.items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A[name].weight.data = torch.cat([decode(block.a) for block in module.blocks])
            layer.lora_B[name].weight.data = torch.cat([decode(block.bt) for block in module.blocks]).T.contiguous()
    install(ours, bank)
    theirs.eval()
    tokens = ids(4)
    with torch.no_grad():
        expected = theirs(tokens, adapter_names=names).logits
        assert_close(ours(tokens, adapter_names=names).logits, expected)


def test_a_plain_adapter_keeps_its_floats(model: Any) -> None:
    name = "model.layers.1.self_attn.v_proj"
    a, b = torch.randn(3, 64), torch.randn(32, 3)
    bank = AdapterBank(model)
    bank.attach("plain", Adapter(Path("."), {}, (LoraPair(name, a, b, 0.25),), None, None))
    linear, x = model.get_submodule(name), torch.randn(2, 5, 64)
    with torch.no_grad():
        with bank.rows(["plain", None]):
            y = linear(x)
        torch.testing.assert_close(y[0], linear(x[0]) + 0.25 * x[0] @ a.T @ b.T)
        assert torch.equal(y[1], linear(x)[1])
    assert bank.nbytes("plain") == 4 * (a.numel() + b.numel())


def test_half_precision_stays_half(model: Any, bank: AdapterBank) -> None:
    model.to(torch.bfloat16)
    tokens = ids(2)
    with torch.no_grad():
        logits = model(tokens, adapter_names=["all", BASE]).logits
        base = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits[1], base[1])
    assert not torch.equal(logits[0], base[0])


@torch.no_grad()
def test_a_packed_layer_is_handed_the_sum_in_float32(model: Any, bank: AdapterBank) -> None:
    """It adds before it rounds: an addend in bfloat16 would have lost a young adapter already."""
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    adapter = packed_adapter(model, linears(model), seed=1).modules[name]
    x = torch.randn(2, 3, 64).bfloat16()
    segments = [Segment((1,), tuple((block.a, block.bt) for block in adapter.blocks))]
    expected = multi_lora_plain(x, segments, layer.out_features)
    assert layer.deltas(x) is None
    with bank.rows([BASE, "all"]):
        assert_close(layer.deltas(x), expected)
        start = Start(encode(torch.randn(3, 64), "lm4:64"), encode(torch.randn(3, layer.out_features), "lm4:64"), 0.5)
        assert_close(layer.deltas(x, start), multi_lora_plain(x, segments, layer.out_features, start))
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0], layer(x)[0])
    exact = x[1].float() @ layer.dense().T + expected[1]
    torch.testing.assert_close(found[1].float(), exact, rtol=1e-2, atol=4e-2)
    with bank.rows([BASE, "last"]):
        assert layer.deltas(x) is None


def test_gradients_flow_where_they_are_asked_for(model: Any, bank: AdapterBank) -> None:
    """The native path writes in place and knows no gradient: it must step aside."""
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):  # dense, packed
        linear = model.get_submodule(name)
        x = torch.randn(2, 3, 64, requires_grad=True)
        with bank.rows(["all", BASE]):
            y = linear(x)
        (found,) = torch.autograd.grad(y.sum(), x)
        with torch.no_grad(), bank.rows(["all", BASE]):
            assert_close(y, linear(x))
        (base,) = torch.autograd.grad(linear(x).sum(), x)
        assert_close(found[1], base[1])
        assert (found[0] - base[0]).abs().max() > 0.01


def test_rows_are_described_once_for_many_steps(model: Any, bank: AdapterBank) -> None:
    with bank.rows(["all", "last"]):
        pass
    first = bank._last
    with bank.rows(["all", "last"]):
        assert bank._last is first
    with bank.rows(["last", "all"]):
        assert bank._last is not first
    bank.detach("attention")
    assert bank._last is None


def test_without_names_the_model_is_its_base(model: Any) -> None:
    tokens = ids(3)
    keys, modules = list(model.state_dict()), [n for n, _ in model.named_modules()]
    with torch.no_grad():
        before = model(tokens).logits
        bank = AdapterBank(model)
        bank.attach("all", packed_adapter(model, linears(model)))
        install(model, bank)
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens, adapter_names=[None, None, BASE]).logits, before)
        assert not torch.equal(model(tokens, adapter_names=["all"] * 3).logits, before)
        assert list(model.state_dict()) == keys
        assert [n for n, _ in model.named_modules()] == modules
        bank.detach("all")
        assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks or getattr(module, "deltas", None) for module in model.modules())
    with pytest.raises(AdapterError, match="no adapter 'all' is attached; attached: none"), bank.rows(["all"]):
        pass


def test_detach_leaves_the_others(model: Any, bank: AdapterBank) -> None:
    tokens = ids(2)
    with torch.no_grad():
        before = model(tokens, adapter_names=["all", "last"]).logits
        bank.detach("attention")
        assert torch.equal(model(tokens, adapter_names=["all", "last"]).logits, before)
    assert bank.names == ("all", "last")


def test_a_copy_of_the_model_has_its_own_bank(model: Any, bank: AdapterBank) -> None:
    twin = copy.deepcopy(model)
    twin.bitloft_bank.detach("all")
    tokens = ids(1)
    with torch.no_grad():
        assert torch.equal(model(tokens, adapter_names=["last"]).logits, twin(tokens, adapter_names=["last"]).logits)
        model(tokens, adapter_names=["all"])
        with pytest.raises(AdapterError, match="no adapter 'all'"):
            twin(tokens, adapter_names=["all"])


def generate(model: Any, rows: list[list[int]], names: list[str], **options: Any) -> list[list[int]]:
    """Greedy continuations of left-padded rows."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        tokens,
        attention_mask=mask,
        adapter_names=names,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        **options,
    )
    return [row[longest:].tolist() for row in out]


def test_generate_left_padded_equals_alone(model: Any, bank: AdapterBank) -> None:
    names = ["all", BASE, "attention", "all"]
    rows = [ids(1, n)[0].tolist() for n in (9, 2, 5, 3)]
    together = generate(model, rows, names)
    alone = [generate(model, [row], [name])[0] for row, name in zip(rows, names, strict=True)]
    assert together == alone
    same = generate(model, [rows[0]] * 3, ["all", BASE, "attention"])
    assert len({tuple(row) for row in same}) == 3


def test_returned_sequences_and_beams_keep_their_adapter(model: Any, bank: AdapterBank) -> None:
    rows, names = [ids(1, 4)[0].tolist(), ids(1, 6)[0].tolist()], ["all", BASE]
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        together = generate(model, rows, names, **options)
        alone = [g for row, name in zip(rows, names, strict=True) for g in generate(model, [row], [name], **options)]
        assert together == alone
    tokens = torch.tensor([rows[0]])
    torch.manual_seed(1)
    sampled = model.generate(tokens, adapter_names=["all"], do_sample=True, num_return_sequences=4, max_new_tokens=2)
    assert sampled.shape[0] == 4


def test_encoder_decoder_beams_expand_the_decoder_only() -> None:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model: Any = T5ForConditionalGeneration(config).eval()
    bank = AdapterBank(model)
    for seed, name in enumerate(("one", "two")):
        bank.attach(name, packed_adapter(model, linears(model), seed=seed, scale=0.1))
    install(model, bank)
    tokens, names = torch.randint(2, 60, (3, 5)), ["one", BASE, "two"]
    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = model.generate(tokens, adapter_names=names, **options)
    for i, name in enumerate(names):
        assert torch.equal(model.generate(tokens[i : i + 1], adapter_names=[name], **options)[0], together[i])


def test_rows_are_counted(model: Any, bank: AdapterBank) -> None:
    with pytest.raises(AdapterError, match="got a batch of 3 rows where adapter names were given for 2"):
        model(ids(3), adapter_names=["all", "last"])
    with pytest.raises(AdapterError, match="one name for each row"):
        model(ids(3), adapter_names="all")
    with pytest.raises(AdapterError, match="no adapter 'nobody' is attached; attached: 'all', 'attention', 'last'"):
        model(ids(1), adapter_names=["nobody"])
    model.train()
    with pytest.raises(AdapterError, match=r"call model.eval\(\) first"):
        model(ids(1), adapter_names=["all"])


def test_names_end_with_an_error_inside(model: Any, bank: AdapterBank) -> None:
    tokens = ids(2)
    with torch.no_grad():
        before = model(tokens).logits
        with pytest.raises(AdapterError):
            model(ids(3), adapter_names=["all", "last"])
        assert torch.equal(model(tokens).logits, before)


def test_refusals_at_attach(model: Any) -> None:
    bank = AdapterBank(model)
    good = packed_adapter(model, ["model.layers.0.self_attn.q_proj"])
    module = good.modules["model.layers.0.self_attn.q_proj"]
    with pytest.raises(AdapterError, match=r"'__base__'.*the name is in use"):
        bank.attach(BASE, good)
    with pytest.raises(AdapterError, match=r"adapts module 'model.layers.7.q', which the model does not have"):
        bank.attach("x", _with(good, {"model.layers.7.q": module}))
    with pytest.raises(AdapterError, match=r"'x' adapts module 'model.norm', a LlamaRMSNorm; only linear"):
        bank.attach("x", _with(good, {"model.norm": module}))
    with pytest.raises(AdapterError, match=r"64 -> 64 features at module 'model.layers.0.mlp.gate_proj'.*64 -> 96"):
        bank.attach("x", _with(good, {"model.layers.0.mlp.gate_proj": module}))
    uneven = PackedBlock(encode(torch.ones(1, 64), "lm2:row"), encode(torch.ones(2, 64), "lm2:row"))
    crooked = PackedModule(module.name, 64, 64, (module.blocks[0], uneven))
    with pytest.raises(AdapterError, match=r"factors of shapes .* that do not fit module"):
        bank.attach("x", _with(good, {module.name: crooked}))
    with pytest.raises(AdapterError, match="adapts no module"):
        bank.attach("x", _with(good, {}))
    assert bank.names == ()
    assert not any(layer._forward_hooks for layer in model.modules())
    bank.attach("x", good)
    with pytest.raises(AdapterError, match=r"'x'.*the name is in use"):
        bank.attach("x", good)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_adapter_is_refused(model: Any, value: float) -> None:
    good = packed_adapter(model, ["model.layers.0.self_attn.q_proj"])
    scales = good.modules["model.layers.0.self_attn.q_proj"].blocks[0].a.scales
    scales.view(torch.float16)[0] = value
    with pytest.raises(
        AdapterError, match=r"NaN or infinity at module 'model.layers.0.self_attn.q_proj'; it is refused"
    ):
        AdapterBank(model).attach("bad", good)


def test_a_module_without_components_has_no_hook(model: Any) -> None:
    good = packed_adapter(model, ["model.layers.0.self_attn.q_proj"])
    name = "model.layers.0.self_attn.k_proj"
    bank = AdapterBank(model)
    bank.attach("x", _with(good, {**good.modules, name: PackedModule(name, 64, 32, ())}))
    assert [n for n, m in model.named_modules() if m._forward_hooks] == ["model.layers.0.self_attn.q_proj"]


def test_views_out_of_use_are_dropped_and_made_again(
    model: Any, bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ids(2)
    with torch.no_grad():
        before = model(tokens, adapter_names=["all", "last"]).logits
        monkeypatch.setattr("bitloft.modules.multi.IN_USE", 1)
        for names in (["all", "all"], ["attention", "last"], ["all", "last"]):
            after = model(tokens, adapter_names=names).logits
    assert torch.equal(after, before)
    assert [name for name, held in bank._held.items() if held._views is not None] == ["last"]
    bank.detach("all")
    bank.detach("last")
    assert not any(model.get_submodule(n)._forward_hooks for n in linears(model) if "mlp" in n)


def test_one_bank_for_a_model(model: Any, bank: AdapterBank) -> None:
    with pytest.raises(AdapterError, match="a model takes one bank"):
        install(model, AdapterBank(model))


def _with(adapter: PackedAdapter, modules: dict[str, PackedModule]) -> PackedAdapter:
    return PackedAdapter(**{**vars(adapter), "modules": modules})
