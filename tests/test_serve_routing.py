"""serve/routing.py: one home per adapter, few moves when replicas come and go, the next in rank when it is full."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs Ray (pip install 'bitloft[ray]')")

from bitloft.serve.routing import RendezvousRouter, ranked


def test_adapters_spread_evenly_and_stay() -> None:
    three, four = ["a", "b", "c"], ["a", "b", "c", "d"]
    adapters = [f"adapter-{i}" for i in range(3000)]
    before = {name: ranked(name, three)[0] for name in adapters}
    after = {name: ranked(name, four)[0] for name in adapters}
    counts = [list(before.values()).count(name) for name in three]
    assert max(counts) < 1.1 * min(counts)
    moved = [name for name in adapters if before[name] != after[name]]
    assert all(after[name] == "d" for name in moved)
    assert len(moved) == pytest.approx(750, rel=0.15)
    assert ranked("x", three) == ranked("x", three[::-1])


def test_the_router_ranks_replicas_of_a_request() -> None:
    replicas: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abcd"]
    router: Any = object.__new__(RendezvousRouter)

    def choose(model: str) -> list[list[str]]:
        request: Any = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=model))
        found = asyncio.run(router.choose_replicas(replicas, request))
        return [[replica.replica_id.unique_id for replica in rank] for rank in found]

    assert choose("billing") == [[name] for name in ranked("billing", list("abcd"))]
    for found in (choose(""), [[r.replica_id.unique_id for r in asyncio.run(router.choose_replicas(replicas))[0]]]):
        assert len(found) == 1
        assert len(set(found[0])) == 2
