"""The engine without HTTP: mixed adapters, joining, leaving, refusing, failing and going on."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from bitloft.errors import CheckpointError, OptionError
from bitloft.options import ServeOptions
from bitloft.serve.batch import Batch, Runner
from bitloft.serve.engine import Engine
from bitloft.serve.requests import Request, RequestError, Sampling
from tests.serving import NAMES, World

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
    step = Runner.step

    def slowly(self: Runner, batch: Batch) -> Tensor:
        time.sleep(0.02)
        return step(self, batch)

    monkeypatch.setattr(Runner, "step", slowly)


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
    monkeypatch.setattr(world.engine, "_eos", frozenset({tokens[4]}))
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
    prompt, step = world.encode(PROMPTS[0]), Runner.step

    def fail(self: Runner, batch: Batch) -> Tensor:
        raise RuntimeError("out of memory")

    async def ask(broken: bool) -> str:
        monkeypatch.setattr(Runner, "step", fail if broken else step)
        return (await world.engine.submit(prompt, "alpha", Sampling(6)).collect())[0]

    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(RequestError, match="the engine failed on this request") as caught,
    ):
        run(ask(broken=True))
    assert caught.value.code == "engine_error"
    assert "out of memory" in caplog.text  # in the log, not in the answer
    assert run(ask(broken=False)) == world.alone(prompt, "alpha", 6)


@pytest.mark.usefixtures("slow")
def test_a_prefill_that_fails_leaves_the_running_rows_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, prefill = world.encode(PROMPTS[0]), Runner.prefill

    def fail(self: Runner, requests: list[Request]) -> tuple[Batch, Tensor]:
        raise RuntimeError("a prompt that breaks")

    async def ask() -> None:
        running = world.engine.submit(prompt, "beta", Sampling(15))
        await until(lambda: len(running.tokens) > 1)
        monkeypatch.setattr(Runner, "prefill", fail)
        with pytest.raises(RequestError, match="the engine failed"):
            await world.engine.submit(prompt, "alpha", Sampling(5)).collect()
        monkeypatch.setattr(Runner, "prefill", prefill)
        assert (await running.collect())[0] == world.alone(prompt, "beta", 15)

    run(ask())


def test_a_row_whose_numbers_overflow_ends_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, step = world.encode(PROMPTS[0]), Runner.step

    def poisoned(self: Runner, batch: Batch) -> Tensor:
        logits = step(self, batch)
        logits[[i for i, r in enumerate(batch.requests) if r.sampling.max_tokens == 7 and len(r.tokens) == 3]] = (
            torch.nan
        )
        return logits

    async def ask() -> list[Any]:
        monkeypatch.setattr(Runner, "step", poisoned)
        asked = [world.engine.submit(prompt, name, Sampling(6 + (name == "beta"))) for name in NAMES]
        return await asyncio.gather(*(request.collect() for request in asked), return_exceptions=True)

    for name, answer in zip(NAMES, run(ask()), strict=True):
        if name == "beta":
            assert isinstance(answer, RequestError)
            assert answer.code == "adapter_numerical_error"
        else:
            assert answer[0] == world.alone(prompt, name, 6)


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


def test_readiness_tells_the_truth(world: World) -> None:
    assert world.engine.unready() is None
    with world.engine_with() as engine:
        assert engine.unready() == "the engine does not run"
        engine.start()
        assert engine.unready() is None
        engine._beat -= 100
        assert (
            "in one step for" in str(engine.unready()) or engine.unready() is None
        )  # the thread may just have looked up


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
