"""traffic.py: Zipf, an exact LRU against a plain one, Che's approximation against the LRU, queues against theory."""

import numpy as np
import pytest

from bitloft.errors import OptionError
from bitloft.traffic import Outcome, Servers, Traffic, che, draw, homes, lru, replicas_needed, simulate, waits, zipf


def plain_lru(asked: list[int], sizes: list[int], budget: int) -> list[bool]:
    """The definition: a list, newest last."""
    held: list[int] = []
    hits = []
    for adapter in asked:
        hits.append(adapter in held)
        if adapter in held:
            held.remove(adapter)
        if sizes[adapter] <= budget:
            held.append(adapter)
        while sum(sizes[a] for a in held) > budget:
            held.pop(0)
    return hits


def servers(**changes: object) -> Servers:
    usual = {"replicas": 1, "budget": 1000, "throughput": 100.0, "service": 0.2, "load_seconds": 0.01, "load_rate": 1e9}
    return Servers(**usual | changes)  # type: ignore[arg-type]


def test_zipf_and_draws() -> None:
    shares = zipf(1000, 1.0)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10)
    assert np.allclose(zipf(10, 0.0), 0.1)
    asked = draw(shares, 200_000, 0)
    assert np.bincount(asked, minlength=1000)[0] / len(asked) == pytest.approx(shares[0], rel=0.03)
    for bad in ((0, 1.0), (5, -1.0), (5, float("nan"))):
        with pytest.raises(OptionError, match="is none; use"):
            zipf(*bad)


@pytest.mark.parametrize("budget", [0, 7, 40, 10_000])
def test_lru_is_the_plain_definition(budget: int) -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(1, 20, 60)
    asked = draw(zipf(60, 0.8), 3000, 2)
    assert lru(asked, sizes, budget).tolist() == plain_lru(asked.tolist(), sizes.tolist(), budget)


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_che_agrees_with_the_exact_cache(exponent: float, share: float) -> None:
    """Equal and unequal sizes, caches of 1 to 50 % of all bytes: within a hundredth."""
    shares = zipf(5000, exponent)
    for sizes in (np.full(5000, 100), np.random.default_rng(0).integers(20, 500, 5000)):
        budget = int(share * sizes.sum())
        asked = draw(shares, 400_000, 3)
        exact = lru(asked, sizes, budget)[200_000:].mean()
        assert float(shares @ che(shares, sizes, budget)) == pytest.approx(exact, abs=0.01)


def test_che_at_the_edges() -> None:
    shares, sizes = zipf(10, 1.0), np.full(10, 5)
    assert che(shares, sizes, 50).tolist() == [1.0] * 10
    assert che(shares, sizes, 4).tolist() == [0.0] * 10
    held = che(shares, sizes, 20)
    assert float(held @ sizes) == pytest.approx(20, rel=1e-6)
    assert (np.diff(held) < 0).all()
    assert che(np.zeros(3), np.ones(3, dtype=np.int64), 1).tolist() == [0, 0, 0]


def test_homes_are_even_and_stay_when_a_replica_comes() -> None:
    before, after = homes(100_000, 8), homes(100_000, 9)
    assert np.abs(np.bincount(before) / 12_500 - 1).max() < 0.03
    moved = before != after
    assert moved.mean() == pytest.approx(1 / 9, rel=0.05)
    assert (after[moved] == 8).all()  # what moves goes to the new one


def test_waits_are_lindleys_and_poissons() -> None:
    random = np.random.default_rng(0)
    gaps, services = random.exponential(1.0, 5000), random.exponential(0.8, 5000)
    wait, plain = 0.0, [0.0]
    for at in range(1, 5000):
        wait = max(0.0, wait + services[at - 1] - gaps[at])
        plain.append(wait)
    assert np.allclose(waits(gaps, services), plain)
    many = random.exponential(1.0, 2_000_000)
    assert waits(many, np.full(len(many), 0.5)).mean() == pytest.approx(0.25, rel=0.02)  # M/D/1: rho s / (2 (1 - rho))


def test_simulation_of_a_small_store() -> None:
    traffic = Traffic(2000, 1.0, 50.0, np.full(2000, 10))
    found = simulate(traffic, servers(), requests=100_000)
    assert isinstance(found, Outcome)
    assert found.exact
    chance = che(zipf(2000, 1.0), traffic.sizes, 1000)
    assert found.hit_rate == pytest.approx(float(zipf(2000, 1.0) @ chance), abs=0.01)
    assert found.busiest == pytest.approx(0.5)
    assert found.load_traffic == pytest.approx(10 * found.loads_per_second)
    # alone 0.2 s; a request in two at most waits, and a miss takes a hundredth more
    assert 0.2 <= found.latency["p50"] < found.latency["p99"] < 0.5
    assert simulate(traffic, servers(price=3.6), requests=1000).cost == pytest.approx(0.001 / 50 * 1e6)


def test_rendezvous_keeps_more_adapters_than_random_routing() -> None:
    traffic = Traffic(4000, 0.9, 200.0, np.full(4000, 10))
    kept, spread = (
        simulate(traffic, servers(replicas=8, budget=2000, router=router), requests=20_000)
        for router in ("rendezvous", "random")
    )
    assert kept.hit_rate > spread.hit_rate + 0.15
    assert kept.busiest >= spread.busiest  # the price: popular adapters have one home


def test_millions_take_seconds_and_the_two_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    big = Traffic(2_000_000, 1.0, 400.0, np.full(2_000_000, 120_000))
    found = simulate(big, servers(replicas=4, budget=8_000_000_000, throughput=300.0), requests=50_000)
    assert not found.exact
    assert 0.5 < found.hit_rate < 1
    small = Traffic(20_000, 0.9, 50.0, np.full(20_000, 10))
    exact = simulate(small, servers(budget=20_000), requests=100_000)
    monkeypatch.setattr("bitloft.traffic.EXACT", 10)
    approximate = simulate(small, servers(budget=20_000), requests=100_000)
    assert approximate.hit_rate == pytest.approx(exact.hit_rate, abs=0.01)
    for name, seconds in exact.latency.items():
        assert approximate.latency[name] == pytest.approx(seconds, rel=0.1)


def test_overload_and_bad_input() -> None:
    traffic = Traffic(10, 1.0, 300.0, np.full(10, 10))
    found = simulate(traffic, servers(throughput=100.0), requests=20_000)
    assert found.busiest == pytest.approx(3)
    assert found.latency["p99"] > 10  # the queue only grows
    with pytest.raises(OptionError, match="router 'nearest' with 1 replicas; use rendezvous or random"):
        simulate(traffic, servers(router="nearest"))
    assert replicas_needed(100.0, 30.0) == 5
    assert replicas_needed(0.1, 30.0) == 1
