"""The server's life: start, drain on a signal, end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from bitloft.errors import BitloftError, CheckpointError, OptionError
from bitloft.options import ServeOptions
from bitloft.serve.http import Server, background, open_service, serve
from tests.serving import World, connect, slowed, until


def test_what_a_server_says_at_its_start(world: World) -> None:
    assert world.said[-2] == f"serving base and 4 adapters at {world.url} (Ctrl-C stops)"
    assert world.said[-1] == f"page at {world.url.removesuffix('v1')}"
    assert world.url.startswith("http://127.0.0.1:")


def test_names(world: World) -> None:
    service = open_service(world.base, None, ServeOptions(name="my-model"), lambda line: None)
    assert service.store.base_name == "my-model"
    assert service.store.names == ()


def test_a_directory_that_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json"):
        serve(tmp_path)


def test_an_adapter_directory_that_does_not_exist(world: World, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_service(world.base, tmp_path / "none", ServeOptions(), lambda line: None)


def test_a_port_that_is_taken(world: World) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(BitloftError, match=f"cannot listen on 127.0.0.1:{port} .*in use.*; use another port"):
            serve(world.base, None, ServeOptions(port=port), lambda line: None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITLOFT_API_KEY", raising=False)
    with pytest.raises(OptionError, match="set a key"):
        ServeOptions(host=host)
    assert ServeOptions(host=host, api_key="k").key == "k"
    assert ServeOptions(host=host, insecure_no_auth=True).key is None
    monkeypatch.setenv("BITLOFT_API_KEY", "from-environment")
    assert ServeOptions(host=host).key == "from-environment"
    assert "from-environment" not in repr(ServeOptions(host=host))
    assert "secret" not in repr(ServeOptions(api_key="secret"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.02)


def stream(server: Server, tokens: int, found: list[str | None], errors: list[Exception]) -> threading.Thread:
    """A client in a thread that collects finish reasons or the error of one stream."""

    def ask() -> None:
        try:
            with connect(server.url) as client:
                chunks = list(client.completions.create(model="alpha", prompt="one", max_tokens=tokens, stream=True))
                found.extend(chunk.choices[0].finish_reason for chunk in chunks)
        except openai.OpenAIError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.service.engine.running > 0)
    return thread


@pytest.mark.usefixtures("slow")
def test_a_signal_lets_running_requests_finish(world: World) -> None:
    found: list[str | None] = []
    errors: list[Exception] = []
    with world.server_with() as server:
        thread = stream(server, 20, found, errors)
        server.handle_exit(signal.SIGTERM, None)
        with connect(server.url) as client, pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="alpha", prompt="one")
        assert caught.value.status_code == 503
        thread.join(30)
        until(lambda: server.should_exit)
    assert found[-1] == "length"
    assert not errors


@pytest.mark.usefixtures("slow")
def test_what_outlives_the_drain_ends_with_an_error(world: World) -> None:
    found: list[str | None] = []
    errors: list[Exception] = []
    with world.server_with(drain_seconds=0.2) as server:
        thread = stream(server, 240, found, errors)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
    assert not found
    assert "shutting down" in str(errors[0])


@pytest.mark.usefixtures("slow")
def test_a_second_signal_ends_at_once(world: World) -> None:
    found: list[str | None] = []
    errors: list[Exception] = []
    with world.server_with(drain_seconds=1000.0) as server:
        thread = stream(server, 240, found, errors)
        began = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
    assert time.monotonic() - began < 5
    assert not found


def test_background_says_when_it_cannot_start(world: World) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        options = ServeOptions(port=holder.getsockname()[1])
        service = open_service(world.base, None, options, lambda line: None)
        with pytest.raises(BitloftError, match="cannot listen on"), background(service, lambda line: None):
            pass


def test_the_command_serves_and_ends_on_sigterm(world: World) -> None:
    """A process of its own: it answers, and SIGTERM ends it with exit code 0."""
    command = ["-m", "bitloft.cli", "serve", str(world.base), "--adapter-dir", str(world.adapters), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("serving"))
        with connect(line.split(" at ")[1].split(" ")[0]) as client:
            answer = client.completions.create(model="alpha", prompt="one", max_tokens=3, temperature=0)
            assert answer.choices[0].text == world.alone(world.encode("one"), "alpha", 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
