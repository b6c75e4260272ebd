"""Which module gets which format and rank: precedence, the paper's rule, bad patterns, stored entries."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitloft.errors import CheckpointError, OptionError
from bitloft.formats import Format
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan, StoredModule, layer_of, plan_of, resolve

NAMES = tuple(
    f"model.layers.{layer}.{part}"
    for layer in range(32)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
)


def formats(**settings: Any) -> dict[str, str]:
    return {name: plan.format for name, plan in resolve(NAMES, QuantizeOptions(**settings)).items()}


def test_without_rules_every_module_has_the_options_own_plan() -> None:
    options = QuantizeOptions(rank=4, alpha=8.0, rslora=True)
    plans = resolve(NAMES, options)
    assert tuple(plans) == NAMES
    assert set(plans.values()) == {plan_of(options)}
    assert plan_of(options).scaling == 8 / 2


@pytest.mark.parametrize(("first", "bits"), [(16, 3.0), (8, 2.5), (4, 2.25)])
def test_the_papers_mixed_precision(first: int, bits: float) -> None:
    """LoftQ table 5: the first 16, 8 or 4 of LLaMA's 32 layers at 4 bits, all others at 2."""
    chosen = formats(first_layers=f"{first}=nf4:64", rest="nf2:64")
    assert sum(Format.parse(f).bits for f in chosen.values()) / len(chosen) == bits
    assert chosen[f"model.layers.{first - 1}.mlp.down_proj"] == "nf4:64"
    assert chosen[f"model.layers.{first}.self_attn.q_proj"] == "nf2:64"


def test_the_first_rule_that_matches_counts_and_goes_before_the_layers() -> None:
    chosen = formats(
        format="nf2:64",
        rules=("model.layers.0.*=lm3:64", "down_proj=nf3:64", "self_attn.*=nf2:32"),
        first_layers="2=nf4:64",
    )
    assert chosen["model.layers.0.mlp.down_proj"] == "lm3:64"
    assert chosen["model.layers.5.mlp.down_proj"] == "nf3:64"
    assert chosen["model.layers.1.self_attn.q_proj"] == "nf2:32"
    assert chosen["model.layers.1.mlp.gate_proj"] == "nf4:64"
    assert chosen["model.layers.9.mlp.gate_proj"] == "nf2:64"


def test_rank_and_alpha_patterns() -> None:
    options = QuantizeOptions(rank=16, alpha=32.0, rank_for=("q_proj=8", "down_proj=0"), alpha_for=("q_proj=4",))
    plans = resolve(NAMES, options)
    q, o, down = (plans[f"model.layers.7.{n}"] for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
    assert (q.rank, q.scaling) == (8, 0.5)
    assert (o.rank, o.scaling) == (16, 2.0)
    assert (down.start_rank, down.scaling) == (0, 0.0)


@pytest.mark.parametrize("field", ["rules", "rank_for", "alpha_for"])
def test_a_pattern_that_matches_nothing_is_refused(field: str) -> None:
    value = {"rules": "nf4:64", "rank_for": "4", "alpha_for": "4"}[field]
    options = QuantizeOptions(**{field: (f"*.q_porj={value}",)})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=rf"{field} pattern '\*\.q_porj' matches none of the 128 modules"):
        resolve(NAMES, options)


def test_qalora_needs_shifts_in_every_format() -> None:
    """Its pooled adapters merge into them."""
    options = QuantizeOptions(solver="qalora", format="uniform4:32+shift", rules=("q_proj=nf4:64",))
    with pytest.raises(OptionError, match="a shift per group, which nf4:64 does not store"):
        resolve(NAMES, options)
    assert plan_of(options).scaling == 0


def test_trellis_codes_along_rows_are_not_calibrated_and_those_by_column_are_no_tables() -> None:
    with pytest.raises(OptionError, match="those of trellis2:row go along rows; use a trellis with groups"):
        plan_of(QuantizeOptions(solver="calibrated", format="trellis2:row"))
    options = QuantizeOptions(solver="loftq", format="trellis2:64")
    with pytest.raises(OptionError, match="a token table is read row by row, and trellis2:64 keeps columns together"):
        StoredModule.of(plan_of(options), options, "embedding")
    assert StoredModule.of(plan_of(options), options, "experts").format == "trellis2:64"
    with pytest.raises(OptionError, match="start_format is trellis2:64, whose codes lie by column"):
        QuantizeOptions(start_format="trellis2:64")


def test_first_layers_of_a_model_without_layers_is_refused() -> None:
    with pytest.raises(OptionError, match="first_layers '2=nf4:64' names layers, but no module's path has a number"):
        resolve(["encoder", "head"], QuantizeOptions(first_layers="2=nf4:64"))


def test_allocated_formats_overrule() -> None:
    plans = resolve(NAMES, QuantizeOptions(format="lm4:64"), formats={NAMES[3]: "lm2:64"})
    assert [plans[name].format for name in NAMES[2:5]] == ["lm4:64", "lm2:64", "lm4:64"]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.31.mlp.down_proj", 31),
        ("encoder.block.3.layer.0.SelfAttention.q", 3),
        ("transformer.h.11.attn.c_attn", 11),
        ("model.layers.2.mlp.experts.7.up_proj", 2),
        ("lm_head", None),
        ("encoder.conv1", None),
    ],
)
def test_layer_of_a_path(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@given(
    fmt=st.sampled_from(["lm2:64", "lm4:64", "nf3:row"]),
    rank=st.integers(0, 64),
    alpha=st.none() | st.floats(0.5, 64),
    kind=st.sampled_from(["linear", "conv1d", "embedding", "experts"]),
    solver=st.sampled_from(["loftq", "qlora"]),
)
def test_stored_entries_come_back(fmt: str, rank: int, alpha: float | None, kind: str, solver: str) -> None:
    options = QuantizeOptions(format="lm4:64", rank=16)
    stored = StoredModule.of(ModulePlan(fmt, solver, rank, alpha), options, kind)
    entry = json.loads(json.dumps(stored.entry(options)))
    assert StoredModule.read(entry, options, "m") == stored


def test_an_entry_like_the_options_is_the_format_alone() -> None:
    options = QuantizeOptions(format="nf2:64", rank=4)
    assert StoredModule.of(plan_of(options), options).entry(options) == "nf2:64"
    assert StoredModule.of(ModulePlan("nf4:64", "loftq", 8), options).entry(options) == {"format": "nf4:64", "rank": 8}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (7, "says 7 of module m; it is damaged or newer"),
        ({"format": "nf4:64", "rank": True}, "it is damaged or newer"),
        ({"format": "nf4:64", "colour": "red"}, "it is damaged or newer"),
        ({"kind": "conv9d"}, "gives module m the unknown kind 'conv9d'"),
    ],
)
def test_damaged_entries_are_refused(entry: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        StoredModule.read(entry, QuantizeOptions(), "m")
