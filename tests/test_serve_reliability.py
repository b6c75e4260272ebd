"""What must hold whatever clients do: no answer of another adapter, nothing left behind, an end in order.

R1, R6, R7, R8 and R19 of the list of reliability goals; the long forms are marked slow. Whole processes are used where
signals matter, the official client where answers do.
"""

import asyncio
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitloft.convert import convert
from bitloft.options import ServeOptions
from bitloft.serve.engine import EngineStats
from bitloft.serve.http import Server, background, open_service
from tests.helpers import make_adapter
from tests.serving import CHAT, World, connect, error_of, process, raw, slowed, until
from tests.watching import repeated

# R1. No wrong-adapter answer.

TOKENS = 8
PROMPTS = ("the quick brown fox jumps", "the quick brown fox jumps over", "the quick brown dog one two three")
GAP = 1e-2  # logits of likeliest and second at every place, so that the merged weights' rounding cannot turn an answer


@dataclass
class Crowd:
    """A server with many adapters and what each pair of adapter and prompt answers alone."""

    server: Server
    directory: Path
    names: list[str]
    expected: dict[tuple[str, str], str]
    clear: list[tuple[str, str]]  # pairs that other arithmetic must answer alike


@contextmanager
def crowd(world: World, directory: Path, count: int, resident: int) -> Iterator[Crowd]:
    """``count`` adapters, memory for ``resident`` of them; answers are asked one at a time, before any load."""
    names = [f"a{i:03}" for i in range(count)]
    for i, name in enumerate(names):
        make_adapter(directory / name, seed=100 + i, scale=1.0, base=world.base)
    one = world.service.store.find("delta").nbytes  # of the same shapes
    budget = str(int(one * (resident + 0.5)))
    settings: dict[str, Any] = {"adapter_budget": budget, "max_queue": 512, "adapter_share": 1.0}
    options = ServeOptions(port=0, batch_invariant=True, queue_seconds=300.0, **settings)
    service = open_service(world.base, directory, options, lambda line: None)
    with background(service, lambda line: None) as server, connect(server.url) as client:
        found = {(name, prompt): alone(client, name, prompt) for name in ("base", *names) for prompt in PROMPTS}
        times = Counter((prompt, text) for (_, prompt), (text, _) in found.items())
        expected = {key: text for key, (text, _) in found.items() if times[key[1], text] == 1}  # it names its adapter
        clear = [key for key in expected if found[key][1] > GAP and key[0] != "base"]
        yield Crowd(server, directory, names, expected, clear)


def alone(client: openai.OpenAI, name: str, prompt: str) -> tuple[str, float]:
    """An answer and the smallest distance of its tokens to the next likely ones."""
    answer = client.completions.create(
        model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=2, extra_body={}
    ).choices[0]
    tops = [sorted(top.values(), reverse=True) for top in (answer.logprobs and answer.logprobs.top_logprobs) or []]
    return answer.text, min((top[0] - top[1] for top in tops if len(top) > 1), default=0.0)


def bombard(found: Crowd, requests: int, clients: int) -> list[str]:
    """What was answered wrong, in words. Adapters by Zipf's law, a fifth for the base, streams and whole answers."""
    draw = random.Random(7)
    usable = {prompt: [n for n in found.names if (n, prompt) in found.expected] for prompt in PROMPTS}
    jobs = []
    for _ in range(requests):
        prompt = draw.choice(PROMPTS)
        weights = [1 / rank for rank in range(1, len(usable[prompt]) + 1)]
        to_base = draw.random() < 0.2 and ("base", prompt) in found.expected
        jobs.append(("base" if to_base else draw.choices(usable[prompt], weights)[0], prompt, draw.random() < 0.5))
    wrong: list[str] = []

    async def client(mine: list[tuple[str, str, bool]], api: openai.AsyncOpenAI) -> None:
        for name, prompt, stream in mine:
            options: Any = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            if stream:
                chunks = [c async for c in await api.completions.create(stream=True, **options)]
                text = "".join(c.choices[0].text for c in chunks)
                if chunks[-1].choices[0].finish_reason is None:
                    wrong.append(f"{name}: a stream was cut off")
            else:
                whole: openai.types.Completion = await api.completions.create(**options)
                text = whole.choices[0].text
            if text != found.expected[name, prompt]:
                others = [n for (n, p), t in found.expected.items() if p == prompt and t == text]
                wrong.append(f"{name} on {prompt!r}: {text!r} (answer of {others})")

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=found.server.url, api_key="x", max_retries=0, timeout=300) as api:
            await asyncio.gather(*(client(jobs[i::clients], api) for i in range(clients)))

    asyncio.run(all_of_them())
    return wrong


def assert_merged(world: World, found: Crowd, samples: int, directory: Path) -> None:
    """A second oracle: the adapter merged into dense weights, and transformers' own forward over these."""
    draw = random.Random(3)
    for i, (name, prompt) in enumerate(draw.sample(found.clear, samples)):
        convert(world.base, directory / f"{i}", to="dense", dtype="float32", adapter=found.directory / name)
        model = AutoModelForCausalLM.from_pretrained(directory / f"{i}", dtype=torch.float32)
        ids = torch.tensor([world.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        assert world.decode(out[0, ids.shape[1] :]) == found.expected[name, prompt]


def check_crowd(world: World, tmp_path: Path, *, count: int, resident: int, requests: int, samples: int) -> None:
    with crowd(world, tmp_path / "adapters", count, resident) as found:
        usable = len(found.expected) / (len(PROMPTS) * (count + 1))
        assert usable > 0.8, "too few answers that name their adapter"
        assert_merged(world, found, samples, tmp_path / "merged")
        assert bombard(found, requests, 64) == []
        stats = found.server.service.store.stats()
        assert stats.evictions > 0
        assert stats.resident <= resident + 1
        until(lambda: found.server.service.engine.idle)  # a row is given back after its answer was sent


def test_no_answer_of_another_adapter(world: World, tmp_path: Path) -> None:
    check_crowd(world, tmp_path, count=30, resident=5, requests=300, samples=3)


@pytest.mark.slow
def test_no_answer_of_another_adapter_among_200(world: World, tmp_path: Path) -> None:
    check_crowd(world, tmp_path, count=200, resident=20, requests=2000, samples=50)


# R6. Cancel frees everything.


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def leaver(url: str, way: str, stream: bool) -> None:
    """A client that leaves without its answer, in one of several ways."""
    parts = urlsplit(url)
    body = json.dumps(
        {"model": random.choice(("alpha", "beta", "base")), "prompt": "one two", "max_tokens": 200, "stream": stream}
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(60)
        client.connect((str(parts.hostname), int(parts.port or 0)))
        client.sendall(f"{head}\r\n\r\n".encode() + body)
        if way == "mid-stream" and stream:
            client.recv(64)
        elif way == "half-closed":
            client.shutdown(socket.SHUT_WR)
        elif way == "not reading":
            time.sleep(0.5)
        if way == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


WAYS = ("at once", "mid-stream", "half-closed", "not reading", "reset")


def server_cache(server: Server) -> int:
    stats = server.service.engine.stats()
    assert isinstance(stats, EngineStats)
    return stats.cache_bytes


def check_leavers(world: World, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    steps = slowed(monkeypatch, 0.005)
    with world.server_with(max_queue=1000, adapter_share=1.0, max_batch=8) as server:
        raw(server.url, "POST", "/v1/completions", {"model": "alpha", "prompt": "one", "max_tokens": 2})
        engine, store = server.service.engine, server.service.store
        until(lambda: not server.server_state.connections)
        before = open_files()
        cache = server_cache(server)
        threads = [threading.Thread(target=leaver, args=(server.url, WAYS[i % 5], i % 10 < 5)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        until(lambda: engine.idle and not server.server_state.tasks and not server.server_state.connections, 10)
        assert server_cache(server) <= cache
        assert all(card.refs == 0 for card in (store.find(None), *store.cards()))
        assert open_files() <= before
        done = len(steps)
        time.sleep(0.3)
        assert len(steps) == done  # nothing is computed for nobody
        status = raw(server.url, "POST", "/v1/completions", {"model": "alpha", "prompt": "one", "max_tokens": 2})[0]
        assert status == 200


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_clients_that_leave_leave_nothing_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    check_leavers(world, monkeypatch, 60)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_300_clients_that_leave_leave_nothing_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    check_leavers(world, monkeypatch, 300)


# R7 and R8. Signals, with a process of its own.


@dataclass
class Reader:
    """A stream that a thread reads to its end."""

    url: str
    tokens: int
    model: str = "alpha"
    begun: bool = False
    finish: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        try:
            with connect(self.url) as client:
                options: Any = {"model": self.model, "prompt": "one", "max_tokens": self.tokens, "stream": True}
                for chunk in client.completions.create(**options):
                    self.begun = True
                    self.finish = chunk.choices[0].finish_reason or self.finish
        except openai.OpenAIError as error:
            self.error = str(error)


def test_sigterm_drains_a_real_process(world: World) -> None:
    """Streams under way finish, new requests are refused with a word to close the connection, the exit code is 0."""
    with process(world.base, world.adapters) as (server, url):
        readers = [Reader(url, 240, ("alpha", "beta", "base")[i % 3]) for i in range(20)]
        until(lambda: all(reader.begun for reader in readers), 60)
        server.send_signal(signal.SIGTERM)
        until(lambda: raw(url, "GET", "/health/ready")[0] == 503, 5)
        status, headers, body = raw(url, "POST", "/v1/chat/completions", {"model": "alpha", "messages": CHAT})
        assert (status, error_of(body)["code"], headers["connection"]) == (503, "shutting_down", "close")
        assert raw(url, "GET", "/health/live")[0] == 200
        for reader in readers:
            reader.thread.join(60)
        assert [reader.error for reader in readers] == [None] * 20
        assert {reader.finish for reader in readers} <= {"length", "stop"}
        assert server.wait(30) == 0


def test_what_outlives_the_drain_gets_an_error_and_a_second_signal_ends_at_once(world: World) -> None:
    with process(world.base, world.adapters, "--drain-seconds", "0.2", "--max-batch", "1") as (server, url):
        readers = [Reader(url, 240) for _ in range(4)]  # one after the other: the last ones cannot be in time
        until(lambda: any(reader.begun for reader in readers), 60)
        server.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.thread.join(60)
        assert [r for r in readers if r.error and "shutting down" in r.error]
        assert all(r.finish or r.error for r in readers)
        assert server.wait(30) == 0
    with process(world.base, world.adapters, "--drain-seconds", "1000", "--max-batch", "1") as (server, url):
        readers = [Reader(url, 240) for _ in range(12)]
        until(lambda: any(reader.begun for reader in readers), 60)
        server.send_signal(signal.SIGTERM)
        until(lambda: raw(url, "GET", "/health/ready")[0] == 503, 5)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 2
        assert time.monotonic() - began < 10
        for reader in readers:
            reader.thread.join(60)


@pytest.mark.slow
def test_killed_servers_come_back_whole(world: World) -> None:
    """SIGKILL under load, at random times: the next server serves every adapter, and its answers are the same."""
    draw = random.Random(5)
    expected = {name: world.alone(world.encode("one two"), name, 6) for name in ("base", "alpha", "beta", "delta")}
    for _ in range(8):
        with process(world.base, world.adapters) as (server, url):
            readers = [Reader(url, 240, ("alpha", "beta", "base")[i % 3]) for i in range(8)]
            time.sleep(draw.random() * 2)
            server.kill()
            for reader in readers:
                reader.thread.join(60)
            assert all(reader.finish or reader.error for reader in readers)
        with process(world.base, world.adapters) as (_, url), connect(url) as client:
            assert len(list(client.models.list())) == 5
            for name, text in expected.items():
                answer = client.completions.create(model=name, prompt="one two", max_tokens=6, temperature=0)
                assert answer.choices[0].text == text


# R19. Huge or odd HTTP; a probe is answered within a second throughout.


@contextmanager
def probed(url: str) -> Iterator[list[float]]:
    """Ask for liveness all the time; yields the seconds that each answer took."""

    def look() -> float:
        began = time.monotonic()
        status = raw(url, "GET", "/health/live")[0]
        return time.monotonic() - began if status == 200 else float("inf")

    with repeated(look, 0.05) as times:
        yield times


def send(url: str, *pieces: bytes, count: int = 1) -> bytes:
    """What comes back for bytes sent by hand, the pieces ``count`` times; the server may close before it has all."""
    parts = urlsplit(url)
    found = b""
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=60) as client:
        try:
            for piece in pieces[:1] + pieces[1:] * count:
                client.sendall(piece)
        except OSError:
            pass
        try:
            while data := client.recv(1 << 16):
                found += data
                if b"\r\n\r\n" in found:
                    break
        except OSError:
            pass
    return found


def chat_of(count: int) -> bytes:
    return json.dumps({"model": "base", "messages": [{"role": "user", "content": ""}] * count}).encode()


ODD: list[tuple[bytes, int, str]] = [
    (chat_of(100_000), 413, "body_too_large"),
    (chat_of(20_000), 400, "invalid_value"),
    (b'{"model": "base", "messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "invalid_value"),
    (b'{"model": "base", "messages": ' + b'{"a": ' * 10_000 + b"1" + b"}" * 10_000 + b"}", 400, "invalid_value"),
    (b'{"model": "base", "prompt": "x", "n": 1000000}', 400, "invalid_value"),
    (b'{"model": "base", "prompt": "x", "max_tokens": 1000000000}', 400, "invalid_value"),
    (b'{"model": "base", "prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", 400, "invalid_value"),
    (b'{"model": "base", "prompt": "x", "temperature": NaN}', 400, "invalid_value"),
    (b'{"model": "base", "prompt": "x", "top_p": -Infinity}', 400, "invalid_value"),
    (b'{"model": "base", "prompt": "x", "logit_bias": {"1": 100}}', 400, "unsupported_parameter"),
    (b'{"model": "base", "prompt": "x", "model": {"a": 1}}', 400, "invalid_value"),
    (b'{"model": "base", "prompt": [-1]}', 400, "invalid_value"),
    (b'{"model": "base", "prompt": [9223372036854775808]}', 400, "invalid_value"),
    (b'{"model": "base\\ud800", "prompt": "x"}', 400, "invalid_value"),
    (b'{"model": "base", "prompt": "\\ud800"}', 400, "invalid_value"),
    (b"\x00" * 1000, 400, "invalid_value"),
    (b"{}", 400, "invalid_value"),
]


def test_huge_and_odd_requests(world: World) -> None:
    with probed(world.url) as times:
        for body, status, code in ODD:
            path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
            found, _, data = raw(world.url, "POST", path, body)
            assert (found, error_of(data)["code"]) == (status, code), body[:60]
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        big = send(world.url, head + b"content-length: 104857600\r\n\r\n", b"x" * (1 << 16), count=1600)
        assert big.startswith(b"HTTP/1.1 413")
        chunked = send(
            world.url, head + b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n", count=100
        )
        assert chunked.startswith(b"HTTP/1.1 413")
        long = send(world.url, b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nx: ", b"y" * (1 << 16), count=16)
        assert long.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
        assert send(world.url, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n").startswith(b"HTTP/1.1 4")
        assert send(world.url, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").startswith(b"HTTP/1.1 400")
        twice = b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"
        assert send(world.url, head + twice).startswith(b"HTTP/1.1 400")
        until(lambda: len(times) > 3)  # all of this may take less than two probes
    assert max(times) < 1
    assert world.engine.idle


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_idle_sockets(world: World, count: int) -> None:
    parts = urlsplit(world.url)
    idle: list[socket.socket] = []
    try:
        with probed(world.url) as times:
            for _ in range(count):
                idle.append(socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=60))
            answer = raw(world.url, "POST", "/v1/completions", {"model": "base", "prompt": "one", "max_tokens": 2})
        assert answer[0] == (200 if count < 4000 else 429)
        assert count >= 4000 or max(times) < 1
    finally:
        for one in idle:
            one.close()
    until(lambda: raw(world.url, "GET", "/health/live")[0] == 200, 20)
