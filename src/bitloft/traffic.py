"""Requests over many adapters, simulated: how often the one that is asked for is in memory, and what a miss costs.

    p_i ~ 1 / i^s                             Zipf's law: the share of requests for the i-th most popular adapter
    sum_i b_i (1 - exp(-p_i T)) = budget      Che's approximation: T is how many requests an adapter stays unused
    hit_i = 1 - exp(-p_i T)                   before an LRU cache of ``budget`` bytes drops it

``lru`` plays the cache request by request and is exact; ``che`` solves one equation, in seconds for millions of
adapters, and is checked against the other (both under independent requests; bursts, which real traffic has, hit more).
Queues are Lindley's recursion, W' = max(0, W + service - gap), in its closed form over cumulative sums. numpy alone:
a plan must not need torch. The alternative, timing a real server, says nothing about machines that are not there.
"""

from collections import OrderedDict
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from bitloft.errors import OptionError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
ROUTERS = ("rendezvous", "random")
EXACT = 200_000  # adapters up to which every request is played


def zipf(adapters: int, exponent: float) -> Floats:
    """Shares of requests [adapters], most popular first, summing to 1. Raises OptionError for a law that is none."""
    if adapters < 1 or not 0 <= exponent < 10:
        raise OptionError(
            f"a Zipf law over {adapters} adapters with exponent {exponent} is none; use 1 or more, 0 to 10."
        )
    shares = np.arange(1, adapters + 1, dtype=np.float64) ** -exponent
    normal: Floats = shares / shares.sum()
    return normal


def draw(shares: Floats, requests: int, seed: int) -> Integers:
    """The adapter of each request [requests], independent draws."""
    cumulative = np.cumsum(shares)
    points = np.random.default_rng(seed).random(requests) * cumulative[-1]
    asked: Integers = np.searchsorted(cumulative, points, side="right").clip(max=len(shares) - 1)
    return asked


def lru(asked: Integers, sizes: Integers, budget: int) -> NDArray[np.bool_]:
    """Whether each request [requests] found its adapter in an LRU cache of ``budget`` bytes that began empty.

    ``sizes`` [adapters] are bytes. An adapter larger than the budget is never kept.
    """
    held: OrderedDict[int, int] = OrderedDict()
    hits = np.zeros(len(asked), dtype=np.bool_)
    filled, bytes_of = 0, sizes.tolist()
    for at, adapter in enumerate(asked.tolist()):
        if adapter in held:
            held.move_to_end(adapter)
            hits[at] = True
            continue
        size = bytes_of[adapter]
        if size > budget:
            continue
        held[adapter] = size
        filled += size
        while filled > budget:
            filled -= held.popitem(last=False)[1]
    return hits


def che(shares: Floats, sizes: Integers, budget: int) -> Floats:
    """The chance of each adapter [adapters] to be in an LRU cache of ``budget`` bytes, by Che's approximation.

    ``shares`` need not sum to 1. Adapters that are never asked for, or larger than the budget, are never held.
    """
    able = (shares > 0) & (sizes <= budget)
    held = np.zeros(len(shares))
    if not able.any():
        return held
    rates, spans = shares[able] / shares[able].sum(), sizes[able].astype(np.float64)
    if spans.sum() <= budget:
        held[able] = 1.0
        return held
    low, high = 0.0, 1.0
    while float(spans @ -np.expm1(-rates * high)) < budget:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(spans @ -np.expm1(-rates * middle)) < budget else (low, middle)
    held[able] = -np.expm1(-rates * high)
    return held


def homes(adapters: int, replicas: int, seed: int = 0) -> Integers:
    """The replica [adapters] of each adapter by rendezvous hashing: the one of the highest hash of the pair.

    Of R replicas, adding or losing one moves an R-th of the adapters and no others.
    """
    best = np.zeros(adapters, dtype=np.uint64)
    found = np.zeros(adapters, dtype=np.int64)
    numbers = np.arange(adapters, dtype=np.uint64)
    for replica in range(replicas):
        mark = _mixed(np.asarray([replica + 1 + (seed << 20)], dtype=np.uint64))
        score = _mixed(numbers ^ mark)
        better = score > best
        best[better], found[better] = score[better], replica
    return found


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64: every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def waits(gaps: Floats, services: Floats) -> Floats:
    """Seconds that each customer [n] waits at one server, first come first served.

    ``gaps`` [n] are the seconds since the one before, ``services`` [n] what each takes.
    """
    steps = np.concatenate(([0.0], services[:-1] - gaps[1:]))
    walk = np.cumsum(steps)
    return walk - np.minimum.accumulate(np.minimum(walk, 0.0))


@dataclass(frozen=True)
class Traffic:
    """What is asked: ``rate`` requests a second over ``adapters`` by Zipf's ``exponent``; ``sizes`` are bytes each."""

    adapters: int
    exponent: float
    rate: float
    sizes: Integers


@dataclass(frozen=True)
class Servers:
    """What answers: ``replicas`` with ``budget`` bytes of adapters each. One answers ``throughput`` requests a second
    and takes ``service`` seconds for an answer alone; a load takes ``load_seconds`` + bytes / ``load_rate``."""

    replicas: int
    budget: int
    throughput: float
    service: float
    load_seconds: float
    load_rate: float
    router: str = "rendezvous"
    price: float = 0.0  # of one replica for an hour


@dataclass(frozen=True)
class Outcome:
    """``latency`` are seconds at the quantiles of QUANTILES; ``busiest`` is the load of the busiest replica (1 and
    more: it cannot keep up); ``load_traffic`` bytes a second of all; ``cost`` of a million requests."""

    hit_rate: float
    load_traffic: float
    loads_per_second: float
    busiest: float
    loader: float
    latency: dict[str, float]
    cost: float
    requests: int
    exact: bool


QUANTILES = (0.5, 0.9, 0.99, 0.999)


def simulate(traffic: Traffic, servers: Servers, *, requests: int = 200_000, seed: int = 0) -> Outcome:
    """Play ``requests`` against the busiest replica, after as many that warm it; hit rates are of all replicas.

    Up to EXACT adapters the replica's cache is played too, beyond it each request hits with Che's chance. Raises
    OptionError for a router that does not exist or fewer than one replica.
    """
    if servers.router not in ROUTERS or servers.replicas < 1 or requests < 1:
        raise OptionError(
            f"router {servers.router!r} with {servers.replicas} replicas; use {' or '.join(ROUTERS)} and 1 or more."
        )
    shares = zipf(traffic.adapters, traffic.exponent)
    order = np.random.default_rng(seed).permutation(traffic.adapters)  # popularity says nothing about a home
    home = homes(traffic.adapters, servers.replicas, seed)[order]
    each = _by_replica(shares, home, servers)
    held = [che(mine, traffic.sizes, servers.budget) for mine in each]
    rates = np.asarray([mine.sum() for mine in each]) * traffic.rate
    missed = sum(mine * (1 - chance) for mine, chance in zip(each, held, strict=True))
    busiest = int(rates.argmax())
    asked = draw(each[busiest], 2 * requests, seed)
    exact = traffic.adapters <= EXACT
    hits = (
        lru(asked, traffic.sizes, servers.budget)
        if exact
        else np.random.default_rng(seed + 1).random(len(asked)) < held[busiest][asked]
    )
    asked, hits = asked[requests:], hits[requests:]
    latency, loader = _latency(asked, hits, traffic.sizes, servers, float(rates[busiest]), seed)
    quantiles = {f"p{100 * q:g}": float(np.quantile(latency, q)) for q in QUANTILES}
    per_second = float(np.sum(missed)) * traffic.rate
    return Outcome(
        hit_rate=float(hits.mean()) if exact and servers.replicas == 1 else 1 - float(np.sum(missed)),
        load_traffic=float(missed @ traffic.sizes) * traffic.rate,
        loads_per_second=per_second,
        busiest=float(rates[busiest]) / servers.throughput,
        loader=loader,
        latency=quantiles,
        cost=servers.replicas * servers.price / (3600 * traffic.rate) * 1e6,
        requests=requests,
        exact=exact,
    )


def _by_replica(shares: Floats, home: Integers, servers: Servers) -> list[Floats]:
    """The share of all requests that each replica gets for each adapter."""
    if servers.router == "random":
        return [shares / servers.replicas] * servers.replicas
    return [np.where(home == replica, shares, 0.0) for replica in range(servers.replicas)]


def _latency(
    asked: Integers, hits: NDArray[np.bool_], sizes: Integers, servers: Servers, rate: float, seed: int
) -> tuple[Floats, float]:
    """Seconds of each request: one loader, then a batch that takes a new request each 1 / throughput; the loader's
    load."""
    gaps = np.random.default_rng(seed + 2).exponential(1 / max(rate, 1e-12), len(asked))
    loads = np.where(hits, 0.0, servers.load_seconds + sizes[asked] / servers.load_rate)
    loading = np.zeros(len(asked))
    missing = ~hits
    if missing.any():
        arrivals = np.cumsum(gaps)[missing]
        between = np.diff(arrivals, prepend=0.0)
        loading[missing] = waits(between, loads[missing]) + loads[missing]
    entering = waits(gaps, np.full(len(asked), 1 / servers.throughput))
    return loading + entering + servers.service, float(loads.mean() * rate)


def replicas_needed(rate: float, throughput: float, *, utilisation: float = 0.7) -> int:
    """Replicas that answer ``rate`` requests a second at that utilisation of their ``throughput``."""
    return max(ceil(rate / (throughput * utilisation)), 1)
