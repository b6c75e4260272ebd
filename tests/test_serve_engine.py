"""The engine without HTTP: mixed adapters, joining, leaving, refusing, failing and going on."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from bitloft.errors import CheckpointError, OptionError
from bitloft.options import ServeOptions
from bitloft.serve.backend import NativeRows, Piece
from bitloft.serve.engine import Engine, EngineStats
from bitloft.serve.requests import Request, RequestError, Sampling
from tests.serving import NAMES, World, failing, slowed

PROMPTS = ["the quick brown fox", "a base is frozen", "what is the capital of france ? paris", "one"]


def run(awaitable: Awaitable[Any]) -> Any:
    """Run on a fresh loop; a test that hangs fails instead."""

    async def limited() -> Any:
        return await asyncio.wait_for(awaitable, 60)

    return asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 20 ms, so that a test can act between two of them."""
    slowed(monkeypatch, 0.02)


def test_mixed_requests_answer_as_each_alone(world: World) -> None:
    """Every adapter on every prompt, all at once, against transformers' generate on one prompt at a time."""
    jobs = [(world.encode(text), name) for text in PROMPTS[2:] for name in NAMES]
    expected = [world.alone(prompt, name, 8) for prompt, name in jobs]
    for start in range(0, len(jobs), len(NAMES)):
        assert len(set(expected[start : start + len(NAMES)])) == len(NAMES)  # else the test could not fail

    async def all_of_them() -> list[tuple[str, str]]:
        asked = [world.engine.submit(prompt, name, Sampling(8)) for prompt, name in jobs]
        answers = await asyncio.gather(*(request.collect() for request in asked))
        await until(lambda: world.engine.idle)
        return answers

    assert [text for text, _ in run(all_of_them())] == expected


@pytest.mark.usefixtures("slow")
def test_requests_join_a_running_batch(world: World) -> None:
    jobs = [(world.encode(PROMPTS[i % 4]), NAMES[i]) for i in range(4)]
    expected = [world.alone(prompt, name, 12) for prompt, name in jobs]

    async def one_after_the_other() -> list[tuple[str, str]]:
        asked: list[Request] = []
        for prompt, name in jobs:
            asked.append(world.engine.submit(prompt, name, Sampling(12)))
            await until(lambda: len(asked[-1].tokens) >= 2)
        assert world.engine.running == 4
        return await asyncio.gather(*(request.collect() for request in asked))

    assert [text for text, _ in run(one_after_the_other())] == expected


def test_the_scheduler_is_changed_under_the_lock_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step runs beside those who submit: what it says of tokens and ends must not meet what they add halfway."""
    engine, outside = world.engine, list[str]()
    for name in ("add", "take", "wrote", "ended", "drop"):
        plain = getattr(engine._scheduler, name)

        def watched(*args: Any, plain: Callable[..., Any] = plain, name: str = name) -> Any:
            if not engine._wake._is_owned():  # type: ignore[attr-defined]
                outside.append(name)
            return plain(*args)

        monkeypatch.setattr(engine._scheduler, name, watched)

    async def several() -> None:
        asked = [engine.submit(world.encode(PROMPTS[0]), name, Sampling(3)) for name in NAMES]
        await asyncio.gather(*(request.collect() for request in asked))
        await until(lambda: engine.idle)

    run(several())
    assert not outside


def test_more_requests_than_rows(world: World) -> None:
    prompt = world.encode(PROMPTS[0])
    expected = [world.alone(prompt, name, 4 + i) for i, name in enumerate(NAMES)]

    async def many() -> list[tuple[str, str]]:
        with world.engine_with(max_batch=2) as engine:
            engine.start()
            asked = [engine.submit(prompt, name, Sampling(4 + i)) for i, name in enumerate(NAMES)]
            return await asyncio.gather(*(request.collect() for request in asked))

    assert [text for text, _ in run(many())] == expected


def test_the_end_of_sequence_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = world.encode(PROMPTS[0])

    async def ask() -> tuple[str, str, list[int]]:
        request = world.engine.submit(prompt, "alpha", Sampling(10))
        return (*await request.collect(), request.tokens)

    text, finish, tokens = run(ask())
    assert finish == "length"
    monkeypatch.setattr(world.engine._running, "eos", frozenset({tokens[4]}))
    shorter, finish, kept = run(ask())
    assert finish == "stop"
    assert kept == tokens[: tokens.index(tokens[4]) + 1]
    assert text.startswith(shorter)


def test_a_seed_repeats_whatever_runs_beside(world: World) -> None:
    prompt, sampling = world.encode(PROMPTS[0]), Sampling(8, temperature=1.0, top_p=0.9, seed=5)

    async def ask(beside: int) -> str:
        others = [world.engine.submit(prompt, NAMES[i], Sampling(9, temperature=1.0)) for i in range(beside)]
        text, _ = await world.engine.submit(prompt, "beta", sampling).collect()
        await asyncio.gather(*(other.collect() for other in others))
        return text

    assert run(ask(0)) == run(ask(4)) == run(ask(2))
    assert run(ask(0)) != world.alone(prompt, "beta", 8)


@pytest.mark.usefixtures("slow")
def test_cancelling_frees_the_row(world: World) -> None:
    prompt = world.encode(PROMPTS[0])

    async def leave() -> None:
        gone = [world.engine.submit(prompt, name, Sampling(200)) for name in NAMES[:3]]
        stays = world.engine.submit(prompt, "delta", Sampling(30))
        await until(lambda: len(gone[0].tokens) > 2)
        task = asyncio.create_task(gone[0].collect())
        await asyncio.sleep(0)
        task.cancel()
        gone[1].cancel()
        gone[2].cancel()
        _, finish = await gone[1].collect()
        assert finish == "cancelled"
        await until(lambda: world.engine.running == 1)
        assert all(request.ended and len(request.tokens) < 60 for request in gone)
        assert (await stays.collect())[0] == world.alone(prompt, "delta", 30)

    run(leave())


def test_a_cancelled_request_leaves_the_queue(world: World) -> None:
    async def leave() -> None:
        with world.engine_with(max_queue=1) as engine:
            waiting = engine.submit([5], None, Sampling(2))
            with pytest.raises(RequestError, match="1 requests are waiting already"):
                engine.submit([5], None, Sampling(2))
            waiting.cancel()
            engine.start()
            assert await waiting.collect() == ("", "cancelled")
            assert not waiting.tokens
            await until(lambda: engine.idle)
            await engine.submit([5], None, Sampling(2)).collect()

    run(leave())


def test_refusals_before_anything_is_computed(world: World) -> None:
    async def ask(prompt: list[int], adapter: str | None, tokens: int) -> str:
        with pytest.raises(RequestError) as caught:
            world.engine.submit(prompt, adapter, Sampling(tokens))
        return caught.value.code

    assert run(ask([5], "nobody", 1)) == "model_not_found"
    assert run(ask([], None, 1)) == "invalid_value"
    assert run(ask([5, 10**6], None, 1)) == "invalid_value"
    assert run(ask([5, -1], None, 1)) == "invalid_value"
    assert run(ask([5] * 200, None, 57)) == "context_length_exceeded"  # 256 fit
    assert run(ask([5] * 300, None, 1)) == "context_length_exceeded"
    assert world.engine.idle


def test_the_context_can_be_filled(world: World) -> None:
    async def ask() -> tuple[str, str]:
        return await world.engine.submit([5] * 246, "alpha", Sampling(10)).collect()

    assert run(ask())[1] == "length"


def test_a_step_that_fails_ends_its_requests_and_no_others(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, before = world.encode(PROMPTS[0]), world.engine.stats().restarts

    async def ask() -> str:
        return (await world.engine.submit(prompt, "alpha", Sampling(6)).collect())[0]

    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        failing(patch, "out of memory")
        with pytest.raises(RequestError, match="the engine failed on this request") as caught:
            run(ask())
    assert caught.value.code == "engine_error"
    assert "out of memory" in caplog.text  # in the log, not in the answer
    assert run(ask()) == world.alone(prompt, "alpha", 6)
    assert world.engine.stats().restarts == before + 1


def test_the_engine_goes_on_after_a_fault(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """R25: whatever runs gets a clean error, what waits is answered, and that within seconds."""
    prompt, ran = world.encode(PROMPTS[0]), NativeRows.run
    faults: list[int] = []

    def fault(self: NativeRows, pieces: Sequence[Piece]) -> Tensor:
        if not faults and len(pieces) == 2:
            faults.append(1)
            raise MemoryError("once")
        return ran(self, pieces)

    async def ask() -> tuple[list[Any], float]:
        with world.engine_with(max_batch=2) as engine:
            engine.start()
            monkeypatch.setattr(NativeRows, "run", fault)
            asked = [engine.submit(prompt, name, Sampling(6)) for name in NAMES]
            answers = await asyncio.gather(*(request.collect() for request in asked), return_exceptions=True)
            began = time.monotonic()
            await until(lambda: engine.idle)
            assert engine.stats().restarts == 1
            assert engine.unready() is None
            return answers, time.monotonic() - began

    answers, seconds = run(ask())
    assert seconds < 5
    assert [type(answer) for answer in answers[:2]] == [RequestError, RequestError]
    assert {answer.code for answer in answers[:2]} == {"engine_error"}
    for name, answer in zip(NAMES[2:], answers[2:], strict=True):
        assert answer[0] == world.alone(prompt, name, 6)


@pytest.mark.usefixtures("slow")
def test_a_prompt_that_fails_leaves_the_running_rows_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, ran = world.encode(PROMPTS[0]), NativeRows.run

    def fail(self: NativeRows, pieces: Sequence[Piece]) -> Tensor:
        if any(len(piece.tokens) > 1 for piece in pieces):
            raise RuntimeError("a prompt that breaks")
        return ran(self, pieces)

    async def ask() -> None:
        running = world.engine.submit(prompt, "beta", Sampling(15))
        await until(lambda: len(running.tokens) > 1)
        with monkeypatch.context() as patch:
            patch.setattr(NativeRows, "run", fail)
            with pytest.raises(RequestError, match="the engine failed"):
                await world.engine.submit(prompt, "alpha", Sampling(5)).collect()
        assert (await running.collect())[0] == world.alone(prompt, "beta", 15)

    run(ask())


@pytest.mark.usefixtures("slow")
def test_a_long_prompt_is_read_in_pieces_beside_those_who_answer(world: World) -> None:
    short, long = world.encode(PROMPTS[0]), [5 + i % 200 for i in range(200)]

    async def ask() -> None:
        with world.engine_with(step_tokens=32) as engine:
            engine.start()
            running = engine.submit(short, "beta", Sampling(30))
            await until(lambda: len(running.tokens) > 1)
            before = len(running.tokens)
            later = engine.submit(long, "alpha", Sampling(4))
            await until(lambda: later.read > 0)
            assert later.read < len(long)
            await until(lambda: len(later.tokens) > 0)
            assert len(running.tokens) - before >= len(long) // 32
            assert (await later.collect())[0] == world.alone(long, "alpha", 4)
            assert (await running.collect())[0] == world.alone(short, "beta", 30)

    run(ask())


def test_logprobs_are_the_model_s(world: World) -> None:
    prompt = world.encode(PROMPTS[0])

    async def ask() -> Request:
        request = world.engine.submit(prompt, "gamma", Sampling(4, logprobs=3))
        told = [one async for event in request for one in event.logprobs]
        assert told == request.logprobs
        return request

    request = run(ask())
    ids = torch.tensor([prompt + request.tokens])
    with world.service.store.holding("gamma") as keys, world.service.store.bank.rows(keys), torch.no_grad():
        log = world.engine.model(ids).logits[0].log_softmax(-1)
    assert len(request.logprobs) == 4
    for i, found in enumerate(request.logprobs):
        row = log[len(prompt) - 1 + i]
        assert found.token == request.tokens[i]
        assert found.logprob == pytest.approx(float(row[found.token]), abs=1e-3)
        assert [token for token, _, _ in found.top] == row.topk(3).indices.tolist()
        assert found.top[0][1] == found.text == world.service.tokenizer.decode([found.token])


def test_several_answers_to_one_prompt(world: World) -> None:
    prompt = world.encode(PROMPTS[0])

    async def ask(n: int, seed: int) -> list[str]:
        made = world.engine.submit_many(prompt, "beta", Sampling(8, temperature=1.5, seed=seed), n)
        assert len({request.id for request in made}) == n
        return [text for text, _ in await asyncio.gather(*(request.collect() for request in made))]

    three = run(ask(3, 7))
    assert three[1:] == run(ask(2, 8))
    assert len(set(three)) > 1


def test_stats_count(world: World) -> None:
    async def ask() -> tuple[EngineStats, EngineStats]:
        with world.engine_with(max_queue=4) as engine:
            before = engine.stats()
            with pytest.raises(RequestError):
                engine.submit([5], "nobody", Sampling(3))
            engine.start()
            await engine.submit([5, 6, 7], "alpha", Sampling(3)).collect()
            gone = engine.submit([5], None, Sampling(3))
            gone.cancel()
            await gone.collect()
            await until(lambda: engine.idle)
            return before, engine.stats()

    before, after = run(ask())
    assert before.steps == before.answer_tokens == 0
    assert after.refused == {"model_not_found": 1}
    assert (after.prompt_tokens, after.finished, after.cancelled, after.failed) == (3, 1, 1, 0)
    assert 1 <= after.answer_tokens <= 3
    assert after.steps >= after.answer_tokens
    assert after.cache_bytes == 0 < after.cache_budget
    card = world.service.store.find("alpha")
    assert card.requests >= 1 <= card.answer_tokens
    assert card.refs == 0


def test_waiting_too_long(world: World) -> None:
    async def ask() -> None:
        with world.engine_with(queue_seconds=0.05) as engine:
            late = engine.submit([5], None, Sampling(2))
            await asyncio.sleep(0.1)
            engine.start()
            with pytest.raises(RequestError, match=r"the request waited longer than 0.05 s") as caught:
                await late.collect()
            assert caught.value.code == "queue_timeout"
            assert not late.tokens

    run(ask())


@pytest.mark.usefixtures("slow")
def test_running_too_long(world: World) -> None:
    async def ask() -> None:
        with world.engine_with(request_seconds=0.5) as engine:
            engine.start()
            long = engine.submit([5], "alpha", Sampling(250))
            with pytest.raises(RequestError, match=r"the request took longer than 0.5 s") as caught:
                await long.collect()
            assert caught.value.code == "request_timeout"
            assert long.tokens

    run(ask())


@pytest.mark.usefixtures("slow")
def test_draining_finishes_what_runs_and_waits(world: World) -> None:
    async def ask() -> None:
        with world.engine_with(max_batch=1) as engine:
            engine.start()
            asked = [engine.submit([5, 6], name, Sampling(5)) for name in ("alpha", "beta")]
            engine.drain()
            assert engine.unready() == "shutting down"
            with pytest.raises(RequestError, match="shutting down") as caught:
                engine.submit([5], None, Sampling(1))
            assert caught.value.code == "shutting_down"
            assert not engine.idle
            for request, name in zip(asked, ("alpha", "beta"), strict=True):
                assert (await request.collect())[0] == world.alone([5, 6], name, 5)
            await until(lambda: engine.idle)

    run(ask())


@pytest.mark.usefixtures("slow")
def test_stopping_ends_everything_with_an_error(world: World) -> None:
    async def ask() -> None:
        with world.engine_with(max_batch=1) as engine:
            engine.start()
            asked = [engine.submit([5, 6], name, Sampling(200)) for name in ("alpha", "beta")]
            await until(lambda: len(asked[0].tokens) > 1)
            engine.stop(wait=False)
            for request in asked:
                with pytest.raises(RequestError, match="shutting down"):
                    await request.collect()
            assert engine.idle

    run(ask())


def test_readiness_tells_the_truth(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """R22: a step that does not end makes the engine unready within seconds, and ready again when it has."""
    assert world.engine.unready() is None
    ran, go_on = NativeRows.run, threading.Event()

    def stuck(self: NativeRows, pieces: Sequence[Piece]) -> Tensor:
        go_on.wait(30)
        return ran(self, pieces)

    async def ask() -> None:
        with world.engine_with() as engine:
            assert engine.unready() == "the engine does not run"
            engine.start()
            assert engine.unready() is None
            monkeypatch.setattr(NativeRows, "run", stuck)
            request = engine.submit([5, 6], "alpha", Sampling(2))
            began = time.monotonic()
            await until(lambda: engine.unready() is not None)
            assert time.monotonic() - began < 5
            assert "the engine has been in one step for" in str(engine.unready())
            go_on.set()
            await request.collect()
            await until(lambda: engine.unready() is None)

    run(ask())


def test_options_that_do_not_fit_the_model(world: World) -> None:
    with (
        pytest.raises(OptionError, match="context is 257, this model has 256 positions"),
        world.engine_with(context=257),
    ):
        pass
    with world.engine_with(context=20) as engine:
        assert engine.context == 20


def test_only_causal_models(world: World, tmp_path: Path) -> None:
    model: Any = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(CheckpointError, match="a T5ForConditionalGeneration does not continue text"):
        Engine(model, world.service.tokenizer, world.service.store, ServeOptions())
