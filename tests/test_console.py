"""The rows of the command table: adapters named on the command line."""

import re
from pathlib import Path

import pytest

from bitloft import console
from bitloft.errors import OptionError


def test_adapters_are_named() -> None:
    assert console.named_paths(["a=x/y", "x/z"]) == {"a": Path("x/y"), "z": Path("x/z")}
    with pytest.raises(OptionError, match="two adapters are named 'y'"):
        console.named_paths(["x/y", "z/y"])


def test_flags_of_the_engine() -> None:
    assert console.cluster_of("local", None, None, 4) is None
    found = console.cluster_of("ray", "auto", "1.5GB", None, 2)
    assert (found.address, found.workers, found.threads, found.memory) == ("auto", None, 2, 1_500_000_000)
    for given, sentence in (
        (("slurm", None, None, None), "unknown engine 'slurm'; use local or ray"),
        (("local", "auto", None, None), "--address is for --engine ray"),
        (("local", None, "1GB", None), "--task-memory is for --engine ray"),
        (("ray", None, "much", None), "task_memory is 'much'; use a size such as"),
        (("ray", "ray://x:1", None, None), "neither auto nor HOST:PORT"),
    ):
        with pytest.raises(OptionError, match=re.escape(sentence)):
            console.cluster_of(*given)
