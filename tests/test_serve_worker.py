"""serve/worker.py: the thread's life by itself, with a child that computes squares."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from bitloft.errors import OptionError
from bitloft.integrations.record import BaseRecord
from bitloft.modules.multi import AdapterBank
from bitloft.options import ServeOptions
from bitloft.serve.requests import RequestError
from bitloft.serve.store import AdapterStore
from bitloft.serve.worker import SWITCH_SECONDS, Worker, context_of
from tests.serving import until

MODEL: Any = BertModel(
    BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
               max_position_embeddings=16)
)  # fmt: skip


class Squares(Worker):
    def __init__(self, **settings: Any) -> None:
        options = ServeOptions(**settings)
        store = AdapterStore(AdapterBank(MODEL), BaseRecord(Path("."), "f" * 64, None, {}), "base", options)
        super().__init__(MODEL, None, store, options, "squares")
        self.todo: list[int] = []
        self.now: int | None = None
        self.done: list[int] = []
        self.lost: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def running(self) -> int:
        return self.now is not None

    @property
    def waiting(self) -> int:
        return len(self.todo)

    def add(self, *numbers: int) -> None:
        with self._wake:
            self._require_open()
            self.todo += numbers
        self._notify()

    def _ready(self) -> bool:
        self.now = self.todo.pop(0) if self.todo else None
        return self.now is not None

    def _turn(self) -> None:
        self.gate.wait(30)
        if self.now is None or self.now < 0:
            raise ValueError("no number")
        self.done.append(self.now**2)
        self.now = None

    def _failed(self) -> None:
        self.lost.append(self.now or 0)
        self.now = None

    def _end(self) -> None:
        self.lost += self.todo
        self.todo.clear()


def test_a_turn_that_raises_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    worker = Squares()
    assert worker.unready() == "the engine does not run"
    sys.setswitchinterval(0.005)
    worker.start()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    worker.add(2, -1, 3)
    until(lambda: worker.idle)
    assert (worker.done, worker.lost) == ([4, 9], [-1])
    assert "a step failed" in caplog.text
    assert worker.unready() is None
    worker.stop()
    assert not worker._thread.is_alive()


def test_the_end_tells_what_is_left_and_draining_takes_nothing_new() -> None:
    worker = Squares()
    worker.gate.clear()
    worker.start()
    worker.add(1, 2, 3)
    until(lambda: worker.running == 1)
    worker.drain()
    assert worker.unready() == "shutting down"
    with pytest.raises(RequestError, match="shutting down"):
        worker.add(4)
    assert (worker.idle, worker.waiting) == (False, 2)
    worker.stop(wait=False)
    worker.gate.set()
    worker.stop()
    assert (worker.done, worker.lost, worker.idle) == ([1], [2, 3], True)


def test_a_long_turn_is_told_by_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Squares()
    worker.gate.clear()
    worker.start()
    worker.add(1)
    until(lambda: worker.running == 1)
    monkeypatch.setattr("bitloft.serve.worker.STALL_SECONDS", 0.01)
    until(lambda: worker.unready() is not None)
    assert "has been in one step for 0 s" in str(worker.unready())
    worker._usual = 60.0  # a model whose steps are long
    assert worker.unready() is None
    worker.gate.set()
    worker.stop()


def test_tokens_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Squares(context=8)
    assert worker.context == 8
    worker._require_tokens([0, 9], "text", "input")
    for ids, sentence in (([], "the text holds no token"), ([10], "a token outside the vocabulary of 10")):
        with pytest.raises(RequestError, match=sentence):
            worker._require_tokens(ids, "text", "input")
    with pytest.raises(OptionError, match="context is 17, this model has 16 positions; use 16 or fewer"):
        context_of(MODEL, 17)
    monkeypatch.setattr(type(MODEL.config), "get_text_config", lambda self: object())
    assert context_of(MODEL, 17) == 17
    with pytest.raises(OptionError, match="does not say how long its context is; set context"):
        context_of(MODEL, None)
