"""The engine: one thread that decodes many requests together, whatever their adapters. It knows no HTTP.

Between two steps cancelled and expired rows leave, waiting requests join (first come, first served) and finished ones
end. A step that raises ends the requests in it with an error and the thread goes on with an empty batch. One thread,
not a pool: a forward uses all cores, and a second one beside it would only halve both.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitloft.errors import CheckpointError, OptionError
from bitloft.options import ServeOptions
from bitloft.serve.batch import Batch, Runner
from bitloft.serve.requests import Event, Request, RequestError, Sampling
from bitloft.serve.sampling import choose, sound
from bitloft.serve.store import AdapterStore
from bitloft.serve.text import TextStream

IDLE_SECONDS = 0.5  # the thread looks up that often while nothing waits
STALL_SECONDS = 60.0  # a step that takes longer means trouble; the longest is the prefill of a full context

log = logging.getLogger("bitloft.serve")


class Engine:
    """Requests in, events out. ``submit`` on an event loop; everything else from any thread."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, store: AdapterStore, options: ServeOptions) -> None:
        """Raises CheckpointError for a model that does not continue text, OptionError for a context beyond its own."""
        if model.config.is_encoder_decoder or not model.can_generate():
            raise CheckpointError(f"a {type(model).__name__} does not continue text; only causal models are served.")
        self.tokenizer, self.store, self.options = tokenizer, store, options
        self.context = _context(model, options.context)
        self.runner = Runner(model, store.bank)
        self.draining = False
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._eos = _eos(model, tokenizer)
        self._waiting: deque[Request] = deque()
        self._joining: list[Request] = []  # out of the queue, not yet in the batch
        self._batch = self.runner.empty()
        self._wake = threading.Condition()  # guards _waiting, _joining and _stopping
        self._stopping = False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="bitloft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait: bool = True) -> None:
        """End all requests with an error and the thread with them."""
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
            return not (self._waiting or self._joining or len(self._batch))

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._batch)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def unready(self) -> str | None:
        """Why new requests would not be answered, or None."""
        if self.draining:
            return "shutting down"
        if not self._thread.is_alive():
            return "the engine does not run"
        stalled = time.monotonic() - self._beat
        return f"the engine has been in one step for {stalled:.0f} s" if stalled > STALL_SECONDS else None

    def submit(self, prompt: list[int], adapter: str | None, sampling: Sampling) -> Request:
        """Queue a prompt of token ids for an adapter by name (None is the base); iterate the result for its events.

        Raises RequestError, before anything is computed: model_not_found, context_length_exceeded, invalid_value (no
        token, or one outside the vocabulary), queue_full, shutting_down.
        """
        if self.draining:
            raise RequestError("shutting_down", "the server is shutting down.")
        handle = self.store.acquire(adapter)
        if not prompt or not all(0 <= token < self._vocabulary for token in prompt):
            found = "no token" if not prompt else f"a token outside the vocabulary of {self._vocabulary}"
            raise RequestError("invalid_value", f"the prompt holds {found}.", "prompt")
        total = len(prompt) + sampling.max_tokens
        if total > self.context:
            raise RequestError(
                "context_length_exceeded",
                f"this model's context is {self.context} tokens; {len(prompt)} of the prompt and {sampling.max_tokens} "
                f"of the answer make {total}. Shorten the prompt or ask for fewer.",
                "max_tokens" if len(prompt) < self.context else "prompt",
            )
        text = TextStream(self.tokenizer, sampling.stop)
        request = Request(prompt, handle.key, sampling, text, asyncio.get_running_loop())
        with self._wake:
            if self._stopping:
                raise RequestError("shutting_down", "the server is shutting down.")
            if len(self._waiting) >= self.options.max_queue:
                raise RequestError(
                    "queue_full", f"{len(self._waiting)} requests are waiting already; try again shortly."
                )
            self._waiting.append(request)
            self._wake.notify()
        return request

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception:
                log.exception("a step failed; its requests end with an error")
                self._fail(self._batch.requests, "engine_error", "the engine failed on this request.")
                self._batch = self.runner.empty()
        with self._wake:
            left = [*self._batch.requests, *self._waiting]
            self._batch = self.runner.empty()
            self._waiting.clear()
        self._fail(left, "shutting_down", "the server is shutting down.")

    def _wait(self) -> bool:
        """Wait for work; False when it is time to stop."""
        with self._wake:
            while not (self._stopping or self._waiting or len(self._batch)):
                self._beat = time.monotonic()
                self._wake.wait(IDLE_SECONDS)
            self._beat = time.monotonic()
            return not self._stopping

    def _turn(self) -> None:
        """One step of the batch, with those who leave before it and those who join."""
        self._drop_expired(self._batch.requests, self.options.request_seconds, "request_timeout", "took")
        self._keep_running()
        self._take()
        if self._joining:
            self._prefill(self._joining)
            self._joining = []
        if len(self._batch):
            self._advance(self._batch, self.runner.step(self._batch))
            self._keep_running()

    def _take(self) -> None:
        """Take from the queue, first come, first served, as many as the batch has room for."""
        with self._wake:
            self._drop_expired([*self._waiting], self.options.queue_seconds, "queue_timeout", "waited")
            queue = _wanted([*self._waiting])
            room = max(self.options.max_batch - len(self._batch), 0)
            self._joining, self._waiting = queue[:room], deque(queue[room:])

    def _prefill(self, joining: list[Request]) -> None:
        """Read the prompts of ``joining``; an error ends these and leaves the running rows alone."""
        try:
            fresh, logits = self.runner.prefill(joining)
            self._advance(fresh, logits)
            staying = [i for i, request in enumerate(joining) if not request.ended]
            self._batch = self._batch.join(fresh.keep(staying))
        except Exception:
            log.exception("a prefill failed; its requests end with an error")
            self._fail(joining, "engine_error", "the engine failed on this request.")

    def _advance(self, batch: Batch, logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Give every row its next token; a row with NaN in its logits ends alone."""
        rows = [i for i, fine in enumerate(sound(logits).tolist()) if fine]
        unsound = [request for i, request in enumerate(batch.requests) if i not in rows]
        self._fail(unsound, "adapter_numerical_error", "the model's numbers overflowed on this request.")
        requests = [batch.requests[i] for i in rows]
        for request, token in zip(requests, choose(logits[rows], requests), strict=True):
            self._accept(request, token)

    def _accept(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        if token in self._eos:
            request.tell(Event(request.text.finish(), "stop"))
            return
        text, stopped = request.text.add(token)
        if stopped:
            request.tell(Event(text, "stop"))
        elif len(request.tokens) >= request.sampling.max_tokens:
            request.tell(Event(text + request.text.finish(), "length"))
        elif text:
            request.tell(Event(text))

    def _keep_running(self) -> None:
        """Free the rows of requests that ended or that nobody waits for."""
        wanted = _wanted(self._batch.requests)
        if not wanted:
            self._batch = self.runner.empty()
        elif len(wanted) < len(self._batch):
            self._batch = self._batch.keep([i for i, r in enumerate(self._batch.requests) if not r.ended])

    def _drop_expired(self, requests: list[Request], seconds: float, code: str, verb: str) -> None:
        late = [r for r in requests if not r.ended and time.monotonic() - r.accepted > seconds]
        self._fail(late, code, f"the request {verb} longer than {seconds:g} s.")

    def _fail(self, requests: list[Request], code: str, message: str) -> None:
        for request in requests:
            if not request.ended:
                request.tell(Event(error=RequestError(code, message)))


def _wanted(requests: list[Request]) -> list[Request]:
    """The requests that go on; a cancelled one gets its last event here."""
    for request in requests:
        if request.cancelled and not request.ended:
            request.tell(Event(finish="cancelled"))
    return [request for request in requests if not request.ended]


def _context(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of prompt and answer together."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = asked or own
    if context is None:
        raise OptionError("this model does not say how long its context is; set context.")
    if own is not None and context > own:
        raise OptionError(f"context is {context}, this model has {own} positions; use {own} or fewer.")
    return int(context)


def _eos(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*many, tokenizer.eos_token_id) if token is not None)
