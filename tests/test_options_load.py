"""What a load test may be asked for."""

import pytest

from bitloft.errors import OptionError
from bitloft.options import LoadOptions


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("requests", 0, "requests is 0; use a positive number"),
        ("clients", -1, "clients is -1"),
        ("rate", 0.0, "rate is 0.0"),
        ("zipf", -1.0, "zipf is -1.0; use 0 to 10"),
        ("zipf", float("nan"), "zipf is nan"),
        ("base_share", 1.5, "base_share is 1.5; use a share from 0 to 1"),
        ("whole", -0.1, "whole is -0.1"),
        ("timeout", float("inf"), "timeout is inf"),
        ("slo_first_ms", 0.0, "slo_first_ms is 0.0"),
    ],
)
def test_values_that_are_refused(name: str, value: float, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        LoadOptions(**{name: value})  # type: ignore[arg-type]


def test_the_key_comes_from_the_option_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLOFT_API_KEY", "e")
    assert LoadOptions().key == "e"
    assert LoadOptions(api_key="o").key == "o"
    assert "o-secret" not in repr(LoadOptions(api_key="o-secret"))
