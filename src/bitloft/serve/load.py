"""bench-serve: a load generator that checks answers while it measures.

Every pair of model and prompt that the run will use is asked alone first, at temperature 0; under load each answer must
be the same text. Generators that only count tokens call a server fast that mixes up its adapters. A wrong answer that
equals another model's answer to the same prompt is told apart from one that equals none: the first is a mix-up, the
second may be a near tie that other sums of floats decided (``--batch-invariant`` of the server rules that out).
"""

import asyncio
import random
import socket
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import accumulate
from typing import Any

from bitloft.errors import BitloftError, OptionError
from bitloft.options import LoadOptions
from bitloft.serve.client import Outcome, Target, ask, get

QUANTILES = (50, 95, 99)
NO_ROOM = (429, 503)
WORDS = (
    "river", "stone", "paper", "window", "garden", "engine", "morning", "winter", "market", "letter", "music",
    "forest", "bridge", "island", "village", "kitchen", "story", "number", "light", "water", "field", "horse", "ship",
    "clock", "road", "door", "cloud", "mountain", "valley", "color",
)  # fmt: skip

Key = tuple[str, int]  # model, index of the prompt
Tell = Callable[[int, int, str], None]  # done, of, what


@dataclass(frozen=True)
class Job:
    """One request of the plan: when it may start (seconds, in an open loop), what it asks and how."""

    at: float
    model: str
    prompt: int
    stream: bool


@dataclass
class Report:
    """What a run measured; times in milliseconds, quantiles by nearest rank. Refused are those that the server had no
    room for (429 and 503): how soon a client is told so matters as much as how many are."""

    requests: int
    models: int
    seconds: float
    reference_seconds: float
    answered: int
    checked: int
    wrong_answers: int
    wrong_by_mix_up: int
    errors: dict[str, int]
    first_token_ms: dict[str, float]
    token_ms: dict[str, float]
    whole_ms: dict[str, float]
    refused: int
    refused_without_retry_after: int
    refused_ms: dict[str, float]
    requests_per_second: float
    tokens_per_second: float
    goodput_requests_per_second: float
    goodput_tokens_per_second: float
    generator_lag_ms: dict[str, float]
    examples: list[str] = field(default_factory=list)


def load(url: str, options: LoadOptions, prompts: Sequence[str] = (), tell: Tell = lambda *_: None) -> Report:
    """Put the server at ``url`` under load. ``prompts`` replace the made-up ones.

    Raises OptionError for a server on another machine (unless allowed) or more adapters than it has, BitloftError where
    it does not answer.
    """
    target = Target.parse(url, options.key)
    if not options.allow_remote and not _is_loopback(target):
        raise OptionError(f"{target.host} is another machine; bench-serve loads it only with --allow-remote.")
    return asyncio.run(_load(target, options, prompts or made_up(options), tell))


async def _load(target: Target, options: LoadOptions, prompts: Sequence[str], tell: Tell) -> Report:
    base, adapters = await models(target)
    if options.adapters is not None:
        if options.adapters > len(adapters):
            raise OptionError(f"adapters is {options.adapters}; this server lists {len(adapters)}.")
        adapters = adapters[: options.adapters]
    jobs = plan(base, adapters, len(prompts), options)
    began = time.perf_counter()
    expected = await references(target, jobs, prompts, options, tell) if options.check else {}
    reference_seconds = time.perf_counter() - began
    began = time.perf_counter()
    outcomes, lags = await run(target, jobs, prompts, options, tell)
    seconds = time.perf_counter() - began
    return judge(jobs, outcomes, lags, expected, options, seconds, reference_seconds)


def _is_loopback(target: Target) -> bool:
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise BitloftError(f"the name {target.host} leads to no machine; give http://HOST:PORT.") from None
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


async def models(target: Target) -> tuple[str, list[str]]:
    """The base and the adapters that the server lists. Raises BitloftError where it does not answer."""
    try:
        status, data = await get(target, "/v1/models")
        if status == 200:
            cards = data["data"]
            base = next(card["id"] for card in cards if card["parent"] is None)
            return base, [card["id"] for card in cards if card["parent"] is not None]
        why = f"status {status}, {data['error']['message']}"
    except (OSError, ValueError, KeyError, TypeError, StopIteration, TimeoutError) as error:
        why = str(error) or type(error).__name__
    raise BitloftError(f"the server at {target.host}:{target.port} does not list its models ({why}).")


def made_up(options: LoadOptions) -> list[str]:
    """Prompts of random words. The first half is common to all: a server that shares what it computed for a prefix
    between adapters gives itself away."""
    draw = random.Random(options.seed)
    common = [draw.choice(WORDS) for _ in range(options.words // 2)]
    rest = options.words - len(common)
    return [" ".join([*common, *(draw.choice(WORDS) for _ in range(rest))]) for _ in range(options.prompts)]


def plan(base: str, adapters: Sequence[str], prompts: int, options: LoadOptions) -> list[Job]:
    """The requests in order: models by Zipf's law over a shuffled list, prompts alike, arrivals a Poisson process."""
    draw = random.Random(options.seed)
    order = list(adapters)
    draw.shuffle(order)
    heights = list(accumulate(1 / rank**options.zipf for rank in range(1, len(order) + 1)))
    jobs, at = [], 0.0
    for _ in range(options.requests):
        asks_base = not order or draw.random() < options.base_share
        model = base if asks_base else order[min(bisect(heights, draw.random() * heights[-1]), len(order) - 1)]
        jobs.append(Job(at, model, draw.randrange(prompts), draw.random() >= options.whole))
        at += draw.expovariate(options.rate) if options.rate else 0.0
    return jobs


def _body(job: Job, prompts: Sequence[str], options: LoadOptions) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": job.model, "prompt": prompts[job.prompt], "max_tokens": options.max_tokens, "temperature": 0,
    }  # fmt: skip
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if job.stream else {})


async def references(
    target: Target, jobs: Sequence[Job], prompts: Sequence[str], options: LoadOptions, tell: Tell
) -> dict[Key, str]:
    """The answer to each pair of the plan with nothing beside it. Raises BitloftError where one fails."""
    pairs = list(dict.fromkeys((job.model, job.prompt) for job in jobs))
    found: dict[Key, str] = {}
    for i, (model, prompt) in enumerate(pairs):
        outcome = await ask(target, _body(Job(0.0, model, prompt, False), prompts, options), options.timeout)
        if outcome.error is not None:
            raise BitloftError(f"asked alone, {model} does not answer prompt {prompt} ({outcome.error}).")
        found[model, prompt] = outcome.text
        tell(i + 1, len(pairs), "alone")
    return found


async def run(
    target: Target, jobs: Sequence[Job], prompts: Sequence[str], options: LoadOptions, tell: Tell
) -> tuple[list[Outcome], list[float]]:
    """All outcomes in the plan's order, and how late (seconds) the generator itself sent each of an open loop."""
    outcomes: list[Outcome | None] = [None] * len(jobs)
    lags: list[float] = []
    done = 0
    waiting = iter(enumerate(jobs))
    began = time.perf_counter()

    async def one(i: int, job: Job) -> None:
        nonlocal done
        outcomes[i] = await ask(target, _body(job, prompts, options), options.timeout)
        done += 1
        tell(done, len(jobs), "under load")

    async def client() -> None:
        for i, job in waiting:
            await one(i, job)

    if options.rate is None:
        await asyncio.gather(*(client() for _ in range(min(options.clients, len(jobs)))))
    else:
        async with asyncio.TaskGroup() as group:
            for i, job in waiting:
                await asyncio.sleep(max(0.0, began + job.at - time.perf_counter()))
                lags.append(max(0.0, time.perf_counter() - began - job.at))
                group.create_task(one(i, job))
    return [outcome for outcome in outcomes if outcome is not None], lags


def judge(
    jobs: Sequence[Job], outcomes: Sequence[Outcome], lags: Sequence[float], expected: dict[Key, str],
    options: LoadOptions, seconds: float, reference_seconds: float,
) -> Report:  # fmt: skip
    """Count what was answered, wrong and good."""
    answered = [(job, out) for job, out in zip(jobs, outcomes, strict=True) if out.error is None]
    checked = [(job, out) for job, out in answered if (job.model, job.prompt) in expected]
    wrong = [(job, out) for job, out in checked if out.text != expected[job.model, job.prompt]]
    others = [(job, out) for job, out in wrong if _is_anothers(job, out.text, expected)]
    bad = {id(out) for _, out in wrong}
    good = [out for _, out in answered if id(out) not in bad and _in_time(out, options)]
    tokens = sum(out.tokens for _, out in answered)
    refused = [out for out in outcomes if out.status in NO_ROOM]
    return Report(
        requests=len(jobs),
        models=len({job.model for job in jobs}),
        seconds=seconds,
        reference_seconds=reference_seconds,
        answered=len(answered),
        checked=len(checked),
        wrong_answers=len(wrong),
        wrong_by_mix_up=len(others),
        errors=dict(Counter(out.error for out in outcomes if out.error is not None)),
        first_token_ms=quantiles([out.first - out.asked for _, out in answered if out.first is not None]),
        token_ms=quantiles([out.token_seconds for _, out in answered if out.token_seconds is not None]),
        whole_ms=quantiles([out.ended - out.asked for _, out in answered]),
        refused=len(refused),
        refused_without_retry_after=sum(out.retry_after is None for out in refused),
        refused_ms=quantiles([out.ended - out.asked for out in refused]),
        requests_per_second=len(answered) / seconds,
        tokens_per_second=tokens / seconds,
        goodput_requests_per_second=len(good) / seconds,
        goodput_tokens_per_second=sum(out.tokens for out in good) / seconds,
        generator_lag_ms=quantiles(lags),
        examples=[
            f"{job.model}, prompt {job.prompt}: {out.text[:60]!r} instead of {expected[job.model, job.prompt][:60]!r}"
            for job, out in wrong[:3]
        ],
    )


def _is_anothers(job: Job, text: str, expected: dict[Key, str]) -> bool:
    return any(text == other for (_, prompt), other in expected.items() if prompt == job.prompt)


def _in_time(out: Outcome, options: LoadOptions) -> bool:
    first, token = out.first, out.token_seconds
    late = options.slo_first_ms is not None and first is not None and 1e3 * (first - out.asked) > options.slo_first_ms
    slow = options.slo_token_ms is not None and token is not None and 1e3 * token > options.slo_token_ms
    return not (late or slow)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds by nearest rank; empty for no values."""
    ordered = sorted(seconds)
    rank = {q: -(-q * len(ordered) // 100) - 1 for q in QUANTILES}
    return {f"p{q}": 1e3 * ordered[rank[q]] for q in QUANTILES} if ordered else {}
