"""The thread that computes: how it begins, waits, fails, goes on and ends, whatever it computes.

What is computed, and of what a turn consists, is its children's: ``engine`` continues texts, ``encoder`` makes vectors.
One thread, not a pool: a forward uses all cores, and a second one beside it would only halve both.
"""

import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from bitloft.errors import OptionError
from bitloft.options import ServeOptions
from bitloft.serve.requests import RequestError
from bitloft.serve.store import AdapterStore

IDLE_SECONDS = 0.5  # the thread looks up that often while nothing waits
STALL_SECONDS = 4.0  # a turn that takes longer, and much longer than those before, means trouble
STALL_FACTOR = 10.0  # times what a turn has taken lately: a large model's are long
LATELY = 0.1  # the newest turn's share in that

# What a thread waits for the interpreter that another one is using. Python's own 5 ms is what the engine may lose after
# each native call to an event loop that is busy refusing (docs/decisions.md has what was measured).
SWITCH_SECONDS = 0.0005

log = logging.getLogger("bitloft.serve")


class Worker(ABC):
    """A model, its adapters, and one thread. Queues belong to the children and are guarded by ``_wake``."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, store: AdapterStore, options: ServeOptions, name: str
    ) -> None:
        """``name`` is the thread's. Raises OptionError for a context beyond the model's own."""
        self.model, self.tokenizer, self.store, self.options = model, tokenizer, store, options
        self.context = context_of(model, options.context)
        self.draining = False
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._wake = threading.Condition()
        self._stopping = False
        self._beat = time.monotonic()
        self._usual = 0.0
        self._refused: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        store.on_change(self._notify)

    # ---- from outside ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; the whole process takes turns with the interpreter more often from here on."""
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._beat = time.monotonic()
        self._thread.start()

    def stop(self, wait: bool = True) -> None:
        """End all that runs and waits with an error, and the thread with it."""
        with self._wake:
            self.draining = self._stopping = True
            self._wake.notify()
        if wait and self._thread.is_alive():
            self._thread.join()

    def drain(self) -> None:
        """Take nothing new; what runs and waits is finished."""
        self.draining = True

    @property
    def idle(self) -> bool:
        """True when nothing runs or waits."""
        with self._wake:
            return not (self.running or self.waiting)

    @property
    @abstractmethod
    def running(self) -> int:
        """How many are computed now."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """How many are queued."""

    def unready(self) -> str | None:
        """Why nothing new would be answered, or None."""
        if self.draining:
            return "shutting down"
        if not self._thread.is_alive():
            return "the engine does not run"
        stalled = time.monotonic() - self._beat
        limit = max(STALL_SECONDS, STALL_FACTOR * self._usual)
        return f"the engine has been in one step for {stalled:.0f} s" if stalled > limit else None

    # ---- for children ------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        """Raise RequestError where nothing new is taken. Under ``_wake``, or what is queued may miss the end."""
        if self.draining:
            raise RequestError("shutting_down", "the server is shutting down.")

    def _require_tokens(self, ids: list[int], what: str, param: str) -> None:
        if not ids or not all(0 <= token < self._vocabulary for token in ids):
            found = "no token" if not ids else f"a token outside the vocabulary of {self._vocabulary}"
            raise RequestError("invalid_value", f"the {what} holds {found}.", param)

    @abstractmethod
    def _ready(self) -> bool:
        """Whether there is something to compute; called under ``_wake``, also now and then while nothing happens."""

    @abstractmethod
    def _turn(self) -> None:
        """Compute once."""

    @abstractmethod
    def _failed(self) -> None:
        """After a turn that raised: end what was in it with an error, so that the next one can begin."""

    @abstractmethod
    def _end(self) -> None:
        """Before the thread ends: tell all that is left."""

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            began = self._beat
            try:
                self._turn()
            except Exception:
                log.exception("a step failed; its requests end with an error")
                self._failed()
            self._usual += LATELY * (time.monotonic() - began - self._usual)
        self._end()

    def _wait(self) -> bool:
        """Wait for work; False when it is time to stop."""
        with self._wake:
            while not (self._stopping or self._ready()):
                self._beat = time.monotonic()
                self._wake.wait(IDLE_SECONDS)
            self._beat = time.monotonic()
            return not self._stopping

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()


def context_of(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of prompt and answer together."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = asked or own
    if context is None:
        raise OptionError("this model does not say how long its context is; set context.")
    if own is not None and context > own:
        raise OptionError(f"context is {context}, this model has {own} positions; use {own} or fewer.")
    return int(context)
