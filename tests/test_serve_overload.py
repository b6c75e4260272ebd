"""R5 over HTTP: a server in a process of its own under ten times what it can do.

The queue stays within its cap, memory stays flat, whoever is refused is told when to come again, whoever was accepted
is answered, and what is answered in a second stays near what it was without the crowd. How fast a refusal comes in
milliseconds is for the bench (bench/overload.py): a test shares its cores.
"""

import sys
from pathlib import Path

import pytest

from bitloft.options import LoadOptions
from bitloft.quantize import quantize
from bitloft.serve.load import Report, load
from tests.helpers import make_adapter, tiny_llama
from tests.serving import process
from tests.watching import watched

QUEUE, ROWS = 24, 2
ANSWER = 64  # tokens
FLAGS = ("--max-queue", str(QUEUE), "--max-batch", str(ROWS), "--adapter-share", "1.0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose steps take a millisecond: with a smaller one a server does nothing but HTTP, and ten times of that
    is more than a client can send."""
    return base_of(tmp_path_factory.mktemp("overload"), hidden=256, layers=6)


def base_of(place: Path, hidden: int, layers: int) -> Path:
    """A base with two adapters beside it."""
    quantize(tiny_llama(place / "model", hidden=hidden, layers=layers), place / "base", format="lm2:64", solver="qlora")
    for seed in (1, 2):
        make_adapter(place / "adapters" / f"a{seed}", seed=seed, base=place / "base")
    return place / "base"


def flood(base: Path, seconds: float) -> tuple[Report, Report, list[tuple[int, int]]]:
    """Reports of a calm run and of the flood, and what was seen of the process while the flood went on."""
    with process(base, base.parent / "adapters", *FLAGS) as (server, url):
        calm = load(url, LoadOptions(requests=30, clients=ROWS, max_tokens=ANSWER, check=False))
        rate = 10 * calm.requests_per_second
        crowd = LoadOptions(requests=int(rate * seconds), rate=rate, max_tokens=ANSWER, check=False)
        load(url, LoadOptions(requests=int(rate * 2), rate=rate, max_tokens=ANSWER, check=False))  # what is kept once
        with watched(server.pid, url) as seen:
            return calm, load(url, crowd), seen


def check(calm: Report, crowd: Report, seen: list[tuple[int, int]]) -> None:
    assert calm.errors == {}
    assert set(crowd.errors) == {"queue_full"}  # those who were taken were answered
    assert crowd.answered + crowd.refused == crowd.requests
    assert crowd.refused > 3 * crowd.answered
    assert crowd.refused_without_retry_after == 0
    assert max(waiting for _, waiting in seen) <= QUEUE
    assert min(waiting for _, waiting in seen[2:-4]) > 0  # else nobody had to wait, and nothing was tried


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_crowd_is_refused_and_the_others_are_answered(base: Path) -> None:
    calm, crowd, seen = flood(base, 5)
    check(calm, crowd, seen)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_minute_of_overload_leaves_memory_and_goodput_where_they_were(tmp_path: Path) -> None:
    """With steps of several milliseconds, as a small model on two cores has them: the client that sends the crowd
    shares them, and ten times of what the smaller base answers would take half a core for refusals alone."""
    calm, crowd, seen = flood(base_of(tmp_path, hidden=640, layers=12), 60)
    check(calm, crowd, seen)
    memory = [used for used, _ in seen]
    assert max(memory) <= 1.05 * memory[0]
    assert crowd.requests_per_second >= 0.8 * calm.requests_per_second
