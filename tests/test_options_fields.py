"""Checks say one sentence and nothing else."""

import pytest

from bitloft.errors import OptionError
from bitloft.options.fields import option, require, require_choices, require_positive
from bitloft.options.train import TrainOptions


def test_require_says_its_sentence() -> None:
    require(True, "unused")
    with pytest.raises(OptionError, match="said"):
        require(False, "said")


def test_choices_and_numbers_are_named_with_their_values() -> None:
    with pytest.raises(OptionError, match="unknown color 'red'; use one of blue, green"):
        require_choices(color=("red", ("blue", "green")))
    with pytest.raises(OptionError, match=r"lr is -0.1"):
        TrainOptions(lr=-0.1)
    require_positive(TrainOptions(), "lr", "rank")  # None passes


def test_a_field_carries_its_help() -> None:
    assert option(3, "a number").metadata["help"] == "a number"
