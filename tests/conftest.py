"""Every test runs offline, on one thread, with its own seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/proc/driver/nvidia"):  # read by triton when peft imports it: its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.helpers import tiny_llama

if TYPE_CHECKING:
    from tests.serving import World

torch.set_num_threads(1)  # results that do not depend on the machine's core count


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and its tokenizer; read it, do not write to it."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster of two processors for all tests that need one: starting it takes ten seconds."""
    pytest.importorskip("ray", reason="needs Ray (pip install 'bitloft[ray]')")
    from bitloft.integrations.ray import Cluster, connected

    with connected(Cluster(workers=2, store=128 << 20)):
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[World]":
    """A base and four adapters, served from a thread until the last test has run."""
    from tests.serving import serving  # only the tests of serving pay for it

    with serving(tmp_path_factory.mktemp("served")) as found:
        yield found
