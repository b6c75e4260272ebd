"""The rows of the command table: adapters named on the command line."""

from pathlib import Path

import pytest

from bitloft import console
from bitloft.errors import OptionError


def test_adapters_are_named() -> None:
    assert console.named_paths(["a=x/y", "x/z"]) == {"a": Path("x/y"), "z": Path("x/z")}
    with pytest.raises(OptionError, match="two adapters are named 'y'"):
        console.named_paths(["x/y", "z/y"])
