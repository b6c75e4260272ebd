"""bench-serve finds wrong answers, counts errors by code and plans its load as it says."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from bitloft.errors import BitloftError, OptionError
from bitloft.options import LoadOptions
from bitloft.serve.answers import Answers
from bitloft.serve.client import Outcome
from bitloft.serve.load import Job, judge, load, made_up, plan, quantiles
from tests.serving import World

OPTIONS = LoadOptions(requests=24, clients=6, prompts=2, words=6, max_tokens=5)


def test_a_server_that_answers_right(world: World) -> None:
    seen: list[tuple[int, int, str]] = []
    found = load(world.url, OPTIONS, tell=lambda *step: seen.append(step))
    assert (found.requests, found.answered, found.checked, found.wrong_answers) == (24, 24, 24, 0)
    assert found.errors == {}
    assert (found.refused, found.refused_ms) == (0, {})
    assert 2 <= found.models <= 5
    assert set(found.first_token_ms) == {"p50", "p95", "p99"}
    assert 0 < found.first_token_ms["p50"] <= found.first_token_ms["p99"] <= found.whole_ms["p99"]
    assert found.requests_per_second == pytest.approx(24 / found.seconds)
    assert found.goodput_requests_per_second == found.requests_per_second
    assert found.tokens_per_second == pytest.approx(24 * 5 / found.seconds)
    assert seen[-1] == (24, 24, "under load")
    assert any(what == "alone" for *_, what in seen)
    json.dumps(found.__dict__)


def test_an_open_loop(world: World) -> None:
    found = load(world.url, replace(OPTIONS, rate=50.0))
    assert (found.answered, found.wrong_answers) == (24, 0)
    assert found.seconds > 24 / 50 / 3
    assert set(found.generator_lag_ms) == {"p50", "p95", "p99"}


def test_a_server_that_mixes_up_its_adapters(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load beta answers for alpha: what a count of tokens would call a success."""
    model, calls = Answers._model, Counter[str]()
    with world.server_with() as server:

        def mixed(self: Answers, body: Any) -> Any:
            engine, name = model(self, body)
            calls[name] += 1
            return engine, "beta" if name == "alpha" and calls[name] > OPTIONS.prompts else name

        monkeypatch.setattr(Answers, "_model", mixed)
        found = load(server.url, replace(OPTIONS, requests=40, adapters=2, zipf=0.0, base_share=0.0, prompts=1))
    assert found.wrong_answers > 5
    assert found.wrong_by_mix_up == found.wrong_answers
    assert found.goodput_requests_per_second < found.requests_per_second
    assert found.examples[0].startswith("alpha, prompt 0: ")


def test_refused_requests_are_counted_by_code(world: World) -> None:
    with world.server_with(max_queue=1, max_batch=1) as server:
        found = load(server.url, replace(OPTIONS, clients=24, max_tokens=40, check=False))
    assert set(found.errors) == {"queue_full"}
    assert found.answered + found.errors["queue_full"] == 24
    assert (found.refused, found.refused_without_retry_after) == (found.errors["queue_full"], 0)
    assert 0 < found.refused_ms["p50"] <= found.refused_ms["p99"]
    assert found.checked == 0


def test_a_key(world: World) -> None:
    with world.server_with(api_key="k") as server:
        assert load(server.url, replace(OPTIONS, requests=4, api_key="k")).answered == 4
        with pytest.raises(BitloftError, match=r"does not list its models \(status 401"):
            load(server.url, OPTIONS)


def test_more_adapters_than_there_are(world: World) -> None:
    with pytest.raises(OptionError, match="adapters is 5; this server lists 4"):
        load(world.url, replace(OPTIONS, adapters=5))


@pytest.mark.parametrize("url", ["http://192.0.2.1", "http://0.0.0.0:8000"])
def test_other_machines_only_when_allowed(url: str) -> None:
    with pytest.raises(OptionError, match="is another machine; bench-serve loads it only with --allow-remote"):
        load(url, OPTIONS)


def test_nobody_there() -> None:
    with pytest.raises(BitloftError, match="does not list its models"):
        load("http://127.0.0.1:9", OPTIONS)
    with pytest.raises(BitloftError, match="leads to no machine"):
        load("http://no-such-name.invalid", OPTIONS)


def test_a_reference_that_fails_ends_the_run(world: World) -> None:
    with pytest.raises(BitloftError, match=r"asked alone, .* does not answer prompt \d \(context_length_exceeded\)"):
        load(world.url, replace(OPTIONS, max_tokens=300))


def test_plans() -> None:
    names = [f"a{i}" for i in range(50)]
    options = replace(OPTIONS, requests=20_000, base_share=0.25, zipf=1.0, whole=0.3, rate=100.0)
    jobs = plan("base", names, 4, options)
    assert jobs == plan("base", names, 4, options)
    assert jobs != plan("base", names, 4, replace(options, seed=1))
    counts = Counter(job.model for job in jobs)
    assert counts.pop("base") / 20_000 == pytest.approx(0.25, abs=0.02)
    (_, first), (_, second), *_, (_, tenth) = counts.most_common(10)
    assert first / second == pytest.approx(2, rel=0.15)
    assert first / tenth == pytest.approx(10, rel=0.2)
    assert sum(not job.stream for job in jobs) / 20_000 == pytest.approx(0.3, abs=0.02)
    assert jobs[-1].at == pytest.approx(200, rel=0.05)
    assert {job.prompt for job in jobs} == {0, 1, 2, 3}
    even = Counter(job.model for job in plan("base", names, 4, replace(options, zipf=0.0, base_share=0.0)))
    assert max(even.values()) < 1.4 * min(even.values())
    assert {job.model for job in plan("base", [], 4, options)} == {"base"}


def test_made_up_prompts_share_their_first_half() -> None:
    first, second = (text.split() for text in made_up(replace(OPTIONS, words=20)))
    assert first[:10] == second[:10]
    assert first[10:] != second[10:]
    assert len(first) == len(second) == 20


def test_judging() -> None:
    jobs = [Job(0.0, model, 0, True) for model in ("a", "b", "a", "a", "b")]
    texts = ("A", "A", "?", "A", "B")
    outs = [Outcome(text, "stop", None, 200, 3, 0.0, 0.1, 0.3) for text in texts]
    outs[3].error = "queue_full"
    outs[4].first = 5.0
    outs[4].ended = 6.0
    options = replace(OPTIONS, slo_first_ms=1000.0)
    found = judge(jobs, outs, [], {("a", 0): "A", ("b", 0): "B"}, options, 2.0, 0.0)
    assert (found.answered, found.wrong_answers, found.wrong_by_mix_up) == (4, 2, 1)
    assert found.errors == {"queue_full": 1}
    assert found.requests_per_second == 2.0
    assert found.goodput_requests_per_second == 0.5  # one wrong, one mixed up, one late
    slow = judge(jobs, outs, [], {}, replace(OPTIONS, slo_token_ms=99.0), 2.0, 0.0)
    assert slow.goodput_requests_per_second == 0.0
    assert found.token_ms["p50"] == pytest.approx(100)


def test_quantiles_by_nearest_rank() -> None:
    values = [i / 1000 for i in range(1, 101)]
    assert quantiles(values) == pytest.approx({"p50": 50, "p95": 95, "p99": 99})
    assert quantiles([0.001]) == pytest.approx({"p50": 1, "p95": 1, "p99": 1})
    assert quantiles([]) == {}
