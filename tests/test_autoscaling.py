"""Ray Serve under load that comes and goes: one replica, then two, then one again, and no answer is lost or wrong."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

pytest.importorskip("ray", reason="needs Ray (pip install 'bitloft[ray]')")

from bitloft.integrations.ray import library
from bitloft.options import ServeOptions
from bitloft.serve.deployment import Replicas, deploy
from bitloft.serve.front import Front, FrontServer
from tests.serving import NAMES, make_adapters, make_base
from tests.test_deployment import PROMPTS, ask

pytestmark = pytest.mark.slow  # a replica takes half a minute to load torch
APP = "scaled"
CLIENTS = 12


@pytest.fixture
def url(ray_cluster: None, tmp_path: Path) -> Iterator[str]:
    """The front's address, over one replica that may become two."""
    from ray import serve

    base = make_base(tmp_path)
    options = ServeOptions(port=0, max_batch=2, drain_seconds=20.0)
    scale = Replicas(1, 2, threads=1, up=2.0, down=6.0)
    handle = deploy(library(), base, make_adapters(tmp_path, base), options, scale, name=APP)
    server = FrontServer(Front(handle), options, lambda line: None)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield server.url
    server.should_exit = True
    thread.join(30)
    serve.shutdown()


def running() -> int:
    """Replicas that answer, from the details below ``serve.status()``: that itself pickles our router, which cannot be
    while tests check its annotations."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    replicas = details["applications"][APP]["deployments"]["replica"]["replicas"]
    return sum(str(getattr(replica["state"], "value", replica["state"])) == "RUNNING" for replica in replicas)


async def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.5)


def test_replicas_come_with_the_load_and_go_with_it(url: str) -> None:
    async def run() -> int:
        stop, answers = asyncio.Event(), 0
        async with httpx.AsyncClient(timeout=120) as client:
            pairs = [(model, prompt) for model in NAMES for prompt in PROMPTS]
            alone = {pair: await ask(client, url, *pair, False) for pair in pairs}
            assert running() == 1

            async def crowd(number: int) -> None:
                nonlocal answers
                turn = number
                while not stop.is_set():
                    pair = pairs[turn % len(pairs)]
                    assert await ask(client, url, *pair, bool(turn % 2)) == alone[pair]
                    answers, turn = answers + 1, turn + 1

            clients = [asyncio.ensure_future(crowd(number)) for number in range(CLIENTS)]
            await until(lambda: running() == 2, 180)
            before = answers
            await until(lambda: answers > before + 10 * CLIENTS, 120)  # two of them, and the crowd goes on
            stop.set()
            await asyncio.gather(*clients)
            some = asyncio.ensure_future(_now_and_then(client, url, alone))
            await until(lambda: running() == 1, 180)
            some.cancel()
            for pair, text in alone.items():
                assert await ask(client, url, *pair, True) == text
        return answers

    assert asyncio.run(run()) > 10 * CLIENTS


async def _now_and_then(client: httpx.AsyncClient, url: str, alone: dict[tuple[str, str], str]) -> None:
    """A little load, so that the replica that goes has something to do when it is told."""
    while True:
        for pair, text in alone.items():
            assert await ask(client, url, *pair, True) == text
            await asyncio.sleep(0.5)
