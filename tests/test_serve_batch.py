"""Rows join and leave a running batch, and every row computes what it would compute alone."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitloft.errors import CheckpointError
from bitloft.modules.multi import AdapterBank
from bitloft.serve.batch import Batch, Runner
from bitloft.serve.requests import Request, Sampling
from bitloft.serve.text import TextStream


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> Runner:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return Runner(model, AdapterBank(model))


def request(length: int) -> Request:
    loop = asyncio.new_event_loop()
    loop.close()
    return Request([random.randrange(3, 300) for _ in range(length)], None, Sampling(50), TextStream(None), loop)


def check(runner: Runner, batch: Batch, logits: Tensor) -> None:
    """Logits equal those of a plain forward over each row's own tokens; then every row takes a random token."""
    assert logits.shape[0] == len(batch)
    for row, asked in zip(logits, batch.requests, strict=True):
        with torch.no_grad():
            alone = runner.model(torch.tensor([asked.prompt + asked.tokens])).logits[0, -1]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)
        asked.tokens.append(random.randrange(3, 300))


def test_rows_join_and_leave(runner: Runner) -> None:
    random.seed(0)
    batch, logits = runner.prefill([request(5), request(2)])
    check(runner, batch, logits)
    for _ in range(3):
        check(runner, batch, runner.step(batch))
    later, logits = runner.prefill([request(11), request(1)])  # longer and shorter than those that run
    check(runner, later, logits)
    batch = batch.join(later)
    check(runner, batch, runner.step(batch))
    assert batch.slots == 12
    batch = batch.keep([0, 3])
    assert batch.slots == 5 + 4  # the longest row that is left
    check(runner, batch, runner.step(batch))
    short, logits = runner.prefill([request(3)])
    check(runner, short, logits)
    batch = short.join(batch)
    for _ in range(2):
        check(runner, batch, runner.step(batch))


def test_random_traffic(runner: Runner) -> None:
    random.seed(1)
    batch = runner.empty()
    for _ in range(25):
        if len(batch) < 6 and random.random() < 0.5:
            fresh, logits = runner.prefill([request(random.randint(1, 12)) for _ in range(random.randint(1, 2))])
            check(runner, fresh, logits)
            batch = batch.join(fresh)
        if len(batch) > 1 and random.random() < 0.4:
            batch = batch.keep(sorted(random.sample(range(len(batch)), random.randint(1, len(batch) - 1))))
        if len(batch):
            check(runner, batch, runner.step(batch))
            assert batch.slots == max(len(r.prompt) + len(r.tokens) - 1 for r in batch.requests)


def test_an_empty_batch_joins(runner: Runner) -> None:
    random.seed(2)
    fresh, _ = runner.prefill([request(3)])
    assert runner.empty().join(fresh) is fresh
    assert fresh.join(runner.empty()) is fresh


def test_a_cache_that_rows_cannot_join_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    monkeypatch.setattr(model.config, "layer_types", ["full_attention", "linear_attention"], raising=False)
    with pytest.raises(CheckpointError, match="a model with linear_attention layers cannot be served"):
        Runner(model, AdapterBank(model))
