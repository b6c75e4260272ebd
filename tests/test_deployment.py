"""serve/deployment.py: two replicas on this machine give each adapter's own answers, streams, cancels and drains.

R1, R6 and R7 of the reliability goals in a small form; the long forms run against one server (test_serve_reliability).
"""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("ray", reason="needs Ray (pip install 'bitloft[ray]')")

from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.ray import Cluster, library
from bitloft.options import ServeOptions
from bitloft.serve import deployment
from bitloft.serve.deployment import Replicas, deploy
from bitloft.serve.front import Front, FrontServer
from tests.serving import NAMES, make_adapters, make_base

PROMPTS = ["the quick brown fox", "a base is frozen", "one two three", "paris is"]


class Served:
    """The front in a thread over two replicas."""

    def __init__(self, place: Path) -> None:
        base = make_base(place)
        adapters = make_adapters(place, base)
        self.options = ServeOptions(port=0, max_batch=4, drain_seconds=20.0)
        self.handle = deploy(library(), base, adapters, self.options, Replicas(2, threads=1), name="tested")
        self.front = Front(self.handle)
        self.said: list[str] = []
        self.server = FrontServer(self.front, self.options, self.said.append)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)
        self.url = self.server.url

    def loads(self) -> list[dict[str, int]]:
        """What two calls say; the base's requests go to either replica."""
        call = self.handle.options(method_name="load")
        return [call.remote().result(timeout_s=30) for _ in range(6)]


@pytest.fixture(scope="module")
def served(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ray import serve

    found = Served(tmp_path_factory.mktemp("deployed"))
    yield found
    found.server.should_exit = True
    found.thread.join(30)
    serve.shutdown()


def body(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **more}


async def ask(client: httpx.AsyncClient, url: str, model: str, prompt: str, stream: bool) -> str:
    sent = body(model, prompt, stream=stream)
    if not stream:
        done = await client.post(f"{url}/completions", json=sent)
        assert done.status_code == 200, done.text
        return str(done.json()["choices"][0]["text"])
    text = ""
    async with client.stream("POST", f"{url}/completions", json=sent) as answer:
        assert answer.status_code == 200
        lines = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        text += json.loads(line)["choices"][0]["text"]
    return text


def test_r1_no_wrong_adapter_answer_through_two_replicas(served: Served) -> None:
    """60 requests at once over base and adapters, half of them streams: each is what the request gives alone."""
    jobs = [(NAMES[i % len(NAMES)], PROMPTS[i % 4], bool(i % 2)) for i in range(60)]

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            alone = {}
            for model, prompt in dict.fromkeys((model, prompt) for model, prompt, _ in jobs):
                alone[model, prompt] = await ask(client, served.url, model, prompt, False)
            assert len(set(alone.values())) > len(NAMES)  # answers tell adapters apart
            found = await asyncio.gather(*(ask(client, served.url, *job) for job in jobs))
        assert [(job, text) for job, text in zip(jobs, found, strict=True) if text != alone[job[0], job[1]]] == []

    asyncio.run(run())


def test_errors_are_the_server_s_own(served: Served) -> None:
    with httpx.Client(timeout=60) as client:
        missing = client.post(f"{served.url}/completions", json=body("nobody", "x"))
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        assert client.post(f"{served.url}/completions", json={"prompt": 3}).status_code == 400
        assert {card["id"] for card in client.get(f"{served.url}/models").json()["data"]} == set(NAMES)
        large = client.post(f"{served.url}/completions", content=b" " * ((1 << 20) + 1))
        assert large.status_code == 413


def test_r6_cancelled_streams_free_their_rows(served: Served) -> None:
    """20 clients leave in the middle of long streams: no row is left in either replica two seconds later."""

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        sent = body(NAMES[number % len(NAMES)], PROMPTS[number % 4], max_tokens=200, stream=True)
        async with client.stream("POST", f"{served.url}/completions", json=sent) as answer:
            async for line in answer.aiter_lines():
                if line:
                    return

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            await asyncio.gather(*(leave(client, number) for number in range(20)))

    asyncio.run(run())
    for _ in range(100):
        if served.front.running == 0 and all(load == {"running": 0, "waiting": 0} for load in served.loads()):
            break
        time.sleep(0.1)
    assert served.front.running == 0
    assert all(load == {"running": 0, "waiting": 0} for load in served.loads())


def test_r7_drain_finishes_what_runs_and_refuses_the_rest(served: Served) -> None:
    """Last of this file: the front stops. Streams that run end whole, a new request gets 503."""

    async def run() -> tuple[list[str], int]:
        async with httpx.AsyncClient(timeout=120) as client, httpx.AsyncClient(timeout=60) as late:
            await late.get(served.url.replace("/v1", "/health/live"))  # a connection that is open already
            streams = [
                asyncio.ensure_future(ask(client, served.url, NAMES[i % len(NAMES)], PROMPTS[i % 4], True))
                for i in range(6)
            ]
            while served.front.running < 6:
                await asyncio.sleep(0.005)
                if all(stream.done() for stream in streams):
                    break
            served.server.drain()
            refused = await late.post(f"{served.url}/completions", json=body("base", "x"))
            return await asyncio.gather(*streams), refused.status_code

    texts, status = asyncio.run(run())
    assert all(texts)
    assert status == 503
    served.thread.join(30)
    assert not served.thread.is_alive()
    assert "serving by replicas on Ray" in served.said[0]


def test_bad_numbers_and_a_base_that_is_none(tmp_path: Path) -> None:
    for wrong in ({"least": 0}, {"least": 3, "most": 2}, {"threads": 0}):
        with pytest.raises(OptionError, match=r"replicas are .* use 1 or more"):
            Replicas(**wrong)
    with pytest.raises(OptionError, match=r"scale-down is -1 seconds; use 0 or more"):
        Replicas(down=-1.0)
    with pytest.raises(CheckpointError, match="is not a directory; give a base"):
        deployment.serve(tmp_path / "none", None, ServeOptions(), Replicas(), Cluster())
