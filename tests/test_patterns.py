"""Patterns and the texts that options are written in."""

import pytest

from bitloft.errors import OptionError
from bitloft.patterns import first_layers_of, matches, number_rule, patterns, split_rule, steps_of


def test_patterns_match_whole_paths_or_ends_after_a_dot() -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert all(matches(name, p) for p in ("q_proj", "self_attn.*", "layers.0.*", "model.*", name))
    assert not any(matches(name, p) for p in ("proj", "attn.q_proj", "layers", "q_proj.*"))


def test_texts_are_read() -> None:
    assert patterns("target", ["a", "b"]) == ("a", "b")
    assert split_rule("rules", " a[=]b = nf4:64 ") == ("a[=]b", "nf4:64")
    assert number_rule("alpha_for", "q=0.5") == 0.5
    assert first_layers_of("4=nf4:64") == (4, "nf4:64")
    assert first_layers_of(None) == (0, "")
    assert [steps_of(given) for given in (3, "3", "auto", 0, "0")] == [3, 3, "auto", "auto", "auto"]


def test_each_bad_text_has_a_sentence() -> None:
    with pytest.raises(OptionError, match="target is the text 'q_proj'; use a list of patterns"):
        patterns("target", "q_proj")
    for rule in ("q_proj", "=4", "q_proj=", " =4"):
        with pytest.raises(OptionError, match=f"rules '{rule}' is not PATTERN=VALUE"):
            split_rule("rules", rule)
    for value in ("many", "-1", "nan", "inf"):
        with pytest.raises(OptionError, match=f"'{value}' cannot be used; use PATTERN=NUMBER with 0 or more"):
            number_rule("rank_for", f"q={value}")
    for text in ("nf4:64", "0=nf4:64", "-1=nf4:64"):
        with pytest.raises(OptionError, match=f"first_layers '{text}' is not K=FORMAT"):
            first_layers_of(text)
    for steps in (-1, "many", "-1"):
        with pytest.raises(OptionError, match="use 1 or more, or auto"):
            steps_of(steps)
