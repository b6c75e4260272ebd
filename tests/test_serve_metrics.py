"""What Prometheus reads is what happened."""

from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bitloft.serve.http import Server
from bitloft.serve.metrics import NAMED, Metrics
from tests.serving import World, connect, raw, slowed, until


def values(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by name and labels."""
    status, headers, body = raw(server.url, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    return read(body)


def read(body: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def one(found: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_counts_and_times(world: World) -> None:
    with world.server_with() as server:
        for stream in (False, True):
            body = {"model": "alpha", "prompt": "one two", "max_tokens": 5, "temperature": 0, "stream": stream}
            assert raw(server.url, "POST", "/v1/completions", body)[0] == 200
        assert raw(server.url, "POST", "/v1/completions", {"model": "nobody", "prompt": "one"})[0] == 404
        assert raw(server.url, "GET", "/made/up/path")[0] == 404
        until(lambda: server.service.engine.idle)  # a row is given back after its answer was sent
        found = values(server)
        assert one(found, "bitloft_requests_total", endpoint="/v1/completions", code="200") == 2
        assert one(found, "bitloft_requests_total", endpoint="/v1/completions", code="404") == 1
        assert one(found, "bitloft_requests_total", endpoint="other", code="404") == 1
        assert one(found, "bitloft_adapter_requests_total", model="alpha") == 2
        for name in ("ttft", "tpot", "e2e", "queue_wait"):
            assert one(found, f"bitloft_{name}_seconds_count") == 2
            assert 0 <= one(found, f"bitloft_{name}_seconds_sum") < 60
        assert one(found, "bitloft_engine_answer_tokens_total") == 10
        assert one(found, "bitloft_running") == one(found, "bitloft_waiting") == 0
        assert one(found, "bitloft_ready") == 1
        assert one(found, "bitloft_adapters", state="memory") == 4
        assert one(found, "bitloft_adapter_bytes", tier="packed") == world.service.store.stats().bytes
        server.service.engine.drain()
        assert one(values(server), "bitloft_ready") == 0


def test_clients_that_leave_are_told_from_requests_that_fail(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.02)
    with world.server_with(max_batch=1, queue_seconds=0.3) as server, connect(server.url) as client:
        options: Any = {"model": "base", "prompt": "one", "max_tokens": 200, "temperature": 0}
        running = client.completions.create(stream=True, **options)
        next(iter(running))
        with pytest.raises(openai.InternalServerError):  # waits in vain
            client.completions.create(**options)
        running.close()
        until(lambda: server.service.engine.idle)
        found = values(server)
        assert one(found, "bitloft_cancelled_total", stage="answer") == 1
        assert not [
            labels for name, labels in found if name == "bitloft_cancelled_total" and ("stage", "queue") in labels
        ]
        assert one(found, "bitloft_engine_failed_total") == 1


def test_names_are_labels_up_to_a_limit(world: World) -> None:
    metrics = Metrics(world.engine, world.service.store)
    for i in range(NAMED + 50):
        metrics.asked(f"adapter-{i}")
    metrics.asked("adapter-0")
    found = read(metrics.text())
    labelled = [labels for name, labels in found if name == "bitloft_adapter_requests_total"]
    assert len(labelled) == NAMED + 1
    assert one(found, "bitloft_adapter_requests_total", model="adapter-0") == 2
    assert one(found, "bitloft_adapter_requests_total", model="other") == 50
    assert metrics.admitted == NAMED + 51


def test_two_servers_do_not_share_figures(world: World) -> None:
    first, second = (Metrics(world.engine, world.service.store) for _ in range(2))
    first.answered("/v1/models", 200)
    assert one(read(first.text()), "bitloft_requests_total", endpoint="/v1/models", code="200") == 1
    assert not [name for name, _ in read(second.text()) if name == "bitloft_requests_total"]
