"""Options: what is read, what is refused in one sentence each; every field has a help text."""

from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass
from typing import Any

import pytest

from bitloft import options
from bitloft.errors import FormatError, OptionError
from bitloft.options import QuantizeOptions
from bitloft.rules import plan_of

KINDS = [kind for name, kind in vars(options).items() if name.endswith("Options") and is_dataclass(kind)]


@pytest.mark.parametrize(("given", "steps"), [(3, 3), ("3", 3), ("auto", "auto"), (0, "auto"), ("0", "auto")])
def test_steps_are_a_number_or_auto(given: int | str, steps: int | str) -> None:
    assert QuantizeOptions(steps=given).steps == steps


def test_rest_is_the_format_and_options_read_back() -> None:
    options = QuantizeOptions(rules=("q=nf4:64",), skip=("head",), first_layers="2=nf4:64", rest="nf2:64", steps="auto")
    assert options.format == "nf2:64"
    assert QuantizeOptions(**asdict(options)) == options


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, "steps is -1; use 1 or more, or auto"),
        ({"steps": "many"}, "steps is 'many'; use 1 or more, or auto"),
        ({"rank": -1}, "rank is -1"),
        ({"alpha": 0.0}, "alpha is 0.0; use a positive number"),
        ({"solver": "svd"}, "unknown solver 'svd'; use one of loftq, calibrated, qlora, qalora"),
        ({"rules": ("q_proj",)}, "rules 'q_proj' is not PATTERN=VALUE"),
        ({"rules": ("=nf4:64",)}, "rules '=nf4:64' is not PATTERN=VALUE"),
        ({"rank_for": ("q=many",)}, "rank_for 'q=many': 'many' cannot be used; use PATTERN=NUMBER with 0 or more"),
        ({"rank_for": ("q=-1",)}, "rank_for 'q=-1': '-1' cannot be used"),
        ({"rank_for": ("q=1.5",)}, "rank_for 'q=1.5': use a whole number"),
        ({"alpha_for": ("q=0",)}, "alpha_for 'q=0': use a positive number"),
        ({"alpha_for": ("q=nan",)}, "alpha_for 'q=nan': 'nan' cannot be used"),
        ({"first_layers": "nf4:64"}, "first_layers 'nf4:64' is not K=FORMAT"),
        ({"first_layers": "0=nf4:64"}, "first_layers '0=nf4:64' is not K=FORMAT"),
        ({"rest": "nf2:64"}, "rest is the format after the first layers; give first_layers too"),
        (
            {"format": "lm2:64", "rest": "nf2:64", "first_layers": "1=nf4:64"},
            "format lm2:64 and rest nf2:64 are two formats for the same layers",
        ),
        ({"target_bits": 0.0}, "target_bits is 0.0; use a positive number"),
        ({"target_bits": 2.5, "rules": ("q=nf4:64",)}, "target_bits chooses the format of every matrix, and rules too"),
        ({"check_text": "a.txt"}, "check_text compares the widths that target_bits chose; give target_bits too"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        QuantizeOptions(**settings)


@pytest.mark.parametrize(
    "settings", [{"format": "nf9:64"}, {"rules": ("q=nf9:64",)}, {"first_layers": "2=nf9:64"}, {"start_format": "x"}]
)
def test_formats_are_read_early(settings: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"no nf code of 9 bits|unknown format"):
        QuantizeOptions(**settings)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_help_and_a_default_that_is_valid(kind: Any) -> None:
    made = kind()
    for f in fields(kind):
        assert f.metadata["help"]
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(kind)[0].name, None)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 1.0),
        ({"alpha": 32.0}, 2.0),
        ({"alpha": 4.0}, 0.25),
        ({"alpha": 8.0, "rslora": True}, 2.0),
        ({"rank": 0}, 0.0),
    ],
)
def test_scaling_is_alpha_over_r_or_its_root(settings: dict[str, Any], scaling: float) -> None:
    assert plan_of(QuantizeOptions(**settings)).scaling == scaling


def test_qlora_keeps_no_start() -> None:
    assert plan_of(QuantizeOptions(solver="qlora")).start_rank == 0
    assert plan_of(QuantizeOptions(solver="qlora")).scaling == 0
