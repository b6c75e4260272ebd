"""Options: checked once, each refusal a sentence with the value and the remedy; every field has a help text."""

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest

from bitloft import options
from bitloft.errors import BitloftError, OptionError
from bitloft.options import QuantizeOptions

KINDS = [kind for name, kind in vars(options).items() if name.endswith("Options") and is_dataclass(kind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_help_and_a_default_that_is_valid(kind: Any) -> None:
    made = kind()
    for f in fields(kind):
        assert f.metadata["help"]
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(kind)[0].name, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "lm5:64"}, "no lm code of 5 bits"),
        ({"start_format": "x"}, "unknown format 'x'"),
        ({"solver": "magic"}, "unknown solver 'magic'; use one of"),
        ({"rank": -1}, "rank is -1; use 0 or more"),
        ({"alpha": 0.0}, r"alpha is 0.0; use a positive"),
        ({"steps": 0}, "steps is 0; use 1 or more"),
    ],
)
def test_bad_quantize_options_name_value_and_remedy(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BitloftError, match=words):
        QuantizeOptions(**settings)


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
    assert QuantizeOptions(**settings).scaling == scaling


def test_qlora_keeps_no_start() -> None:
    assert QuantizeOptions(solver="qlora").start_rank == 0
    assert QuantizeOptions(solver="qlora").scaling == 0


def test_require_says_its_sentence() -> None:
    options.require(True, "unused")
    with pytest.raises(OptionError, match="said"):
        options.require(False, "said")
