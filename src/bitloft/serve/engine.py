"""The engine: one thread that computes many requests together, whatever their adapters. It knows no HTTP.

Between two steps cancelled and expired requests leave and waiting ones take their rows, in the scheduler's order. A
step that raises ends the requests in it with an error; the thread (``worker``) begins anew with an empty batch.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from bitloft.errors import CheckpointError
from bitloft.integrations import decoder
from bitloft.modules.multi import AdapterBank
from bitloft.options import ServeOptions
from bitloft.options.generate import bytes_of
from bitloft.serve.backend import Backend, NativeRows
from bitloft.serve.batch import ModelRows
from bitloft.serve.memory import free_memory
from bitloft.serve.requests import Request, RequestError, Sampling
from bitloft.serve.running import Running
from bitloft.serve.scheduler import Scheduler
from bitloft.serve.selftest import self_test
from bitloft.serve.store import AdapterStore, Handle
from bitloft.serve.text import TextStream
from bitloft.serve.worker import Worker, log

SHARE_OF_FREE = 0.5  # of free memory, for keys and values where no budget is given


@dataclass(frozen=True)
class EngineStats:
    """Numbers since the start, and now; seconds and bytes."""

    running: int
    waiting: int
    batch_adapters: int
    steps: int
    step_seconds: float
    last_step_age: float
    prompt_tokens: int
    answer_tokens: int
    finished: int
    failed: int
    cancelled: int
    refused: dict[str, int]
    restarts: int
    quarantined: int
    cache_bytes: int
    cache_budget: int
    max_batch: int
    max_queue: int


def backend_for(model: PreTrainedModel, bank: AdapterBank, *, batch_invariant: bool = False) -> Backend:
    """The fastest backend that takes ``model``. Raises CheckpointError where none does."""
    if decoder.reason(model) is None:
        return NativeRows(model, bank)
    return ModelRows(model, bank, batch_invariant=batch_invariant)


class Engine(Worker):
    """Requests in, events out. ``submit`` on an event loop; everything else from any thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        store: AdapterStore,
        options: ServeOptions,
        backend: Backend | None = None,
    ) -> None:
        """Raises CheckpointError for a model that does not continue text, OptionError for a context beyond its own."""
        if model.config.is_encoder_decoder or not model.can_generate():
            raise CheckpointError(f"a {type(model).__name__} does not continue text; only causal models are served.")
        super().__init__(model, tokenizer, store, options, "bitloft-engine")
        self.backend = backend or backend_for(model, store.bank, batch_invariant=options.batch_invariant)
        self.cache_budget = bytes_of(options.cache_budget) or int(SHARE_OF_FREE * free_memory())
        self._scheduler = Scheduler(most=options.max_queue, share=options.adapter_share, max_wait=options.max_wait)
        self._running = Running(
            self.backend, tokenizer, _eos(model, tokenizer), options.step_tokens, self._quarantine,
            wrote=self._wrote, ended=self._ended,
        )  # fmt: skip
        self._step_seconds = 0.0
        self._restarts = 0
        self._quarantined: set[str] = set()

    # ---- from outside ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Check on a few tokens that rows of different adapters do not touch each other, then take requests.

        Raises CheckpointError where they do.
        """
        self_test(self.backend, self.store)
        super().start()

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._running.requests)

    @property
    def waiting(self) -> int:
        return len(self._scheduler)

    def stats(self) -> EngineStats:
        totals = self._running.totals
        return EngineStats(
            self.running, self.waiting, totals.adapters, totals.steps, self._step_seconds,
            time.monotonic() - self._beat, totals.prompt_tokens, totals.answer_tokens, totals.finished, totals.failed,
            totals.cancelled, dict(self._refused), self._restarts, len(self._quarantined), self._running.cache_bytes,
            self.cache_budget, self.options.max_batch, self.options.max_queue,
        )  # fmt: skip

    def submit(self, prompt: list[int], adapter: str | None, sampling: Sampling) -> Request:
        """Queue a prompt of token ids for an adapter by name (None is the base); iterate the result for its events.

        Raises RequestError, before anything is computed: model_not_found, context_length_exceeded, invalid_value (no
        token, or one outside the vocabulary), queue_full, adapter_capacity, adapter_invalid, adapter_numerical_error,
        shutting_down.
        """
        return self.submit_many(prompt, adapter, sampling, 1)[0]

    def submit_many(self, prompt: list[int], adapter: str | None, sampling: Sampling, n: int) -> list[Request]:
        """``n`` answers to one prompt, all queued or none; a seed counts up by one for each."""
        try:
            return self._submit(prompt, adapter, sampling, n)
        except RequestError as error:
            self._refused[error.code] += 1
            raise

    def _submit(self, prompt: list[int], adapter: str | None, sampling: Sampling, n: int) -> list[Request]:
        self._require_open()
        self.store.find(adapter)
        self._check(prompt, sampling)
        made: list[Request] = []
        with self._wake:
            self._require_open()
            self._scheduler.check(self.store.find(adapter).key, n)
            handles = self._held(adapter, n)
            for i, handle in enumerate(handles):
                seed = None if sampling.seed is None else sampling.seed + i
                chosen = sampling if i == 0 else Sampling(**{**sampling.__dict__, "seed": seed})
                text = TextStream(self.tokenizer, sampling.stop)
                made.append(Request(prompt, handle, chosen, text, asyncio.get_running_loop()))
            for request in made:
                self._scheduler.add(request)
            self._wake.notify()
        return made

    def require_room(self, adapter: str | None, n: int) -> None:
        """Raise RequestError where ``n`` requests would be refused now, whatever their prompts: a caller that has a
        prompt to prepare first asks before it does, so that a full queue costs nobody that work."""
        key = self.store.find(adapter).key
        try:
            with self._wake:
                self._require_open()
                self._scheduler.check(key, n)
        except RequestError as error:
            self._refused[error.code] += 1
            raise

    def _held(self, adapter: str | None, n: int) -> list[Handle]:
        """``n`` handles, or none."""
        found: list[Handle] = []
        try:
            for _ in range(n):
                found.append(self.store.acquire(adapter))
        except RequestError:
            for handle in found:
                handle.release()
            raise
        return found

    def _check(self, prompt: list[int], sampling: Sampling) -> None:
        self._require_tokens(prompt, "prompt", "prompt")
        total = len(prompt) + sampling.max_tokens
        if total > self.context:
            raise RequestError(
                "context_length_exceeded",
                f"this model's context is {self.context} tokens; {len(prompt)} of the prompt and {sampling.max_tokens} "
                f"of the answer make {total}. Shorten the prompt or ask for fewer.",
                "max_tokens" if len(prompt) < self.context else "prompt",
            )
        if self.backend.bytes_for(total) > self.cache_budget:
            raise RequestError(
                "context_length_exceeded", f"{total} tokens are more than this server has memory for.", "max_tokens"
            )

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def _failed(self) -> None:
        self._restarts += 1
        with self._wake:
            self._running.restart("engine_error", "the engine failed on this request.")

    def _end(self) -> None:
        with self._wake:
            left = list(self._scheduler)
            self._scheduler.drop(lambda request: False)
        self._running.restart("shutting_down", "the server is shutting down.")
        self._running.fail(left, "shutting_down", "the server is shutting down.")

    def _ready(self) -> bool:
        if self._running.requests:
            return True
        self._drop()
        return self._takes()

    def _takes(self) -> bool:
        return any(request.cancelled or request.handle.ready() for request in self._scheduler)

    def _turn(self) -> None:
        """One step, with those who leave before it and those who join."""
        with self._wake:
            late = self._expired(self._running.requests, self.options.request_seconds)
            self._running.fail(
                late, "request_timeout", f"the request took longer than {self.options.request_seconds:g} s."
            )
            self._running.sweep()
            self._drop()
            self._take()
        if self._running.requests:
            began = time.monotonic()
            self._running.step()
            self._step_seconds += time.monotonic() - began

    def _take(self) -> None:
        """Give rows to those who wait, while there are rows and memory."""
        room = self.cache_budget - self._running.cache_bytes
        while len(self._running.requests) < self.options.max_batch:
            left = room
            request = self._scheduler.take(lambda r, left=left: self.backend.bytes_for(r.total) <= left)  # type: ignore[misc]
            if request is None:
                return
            request.started = time.monotonic()
            room -= self.backend.bytes_for(request.total)
            self._running.admit(request)

    def _drop(self) -> None:
        """End those in the queue that waited too long, were cancelled, or whose adapter does not come."""
        waiting, seconds = list(self._scheduler), self.options.queue_seconds
        self._running.cancel(waiting)
        for request in waiting:
            failure = getattr(request.handle, "failure", None)
            if failure is not None:
                self._running.fail([request], failure.code, str(failure))
        for request in self._expired(waiting, seconds):
            said = f"the request waited longer than {seconds:g} s."
            if request.handle.ready():
                self._running.fail([request], "queue_timeout", said, self._scheduler.retry_after())
            else:
                said = f"{said[:-1]} for room for its adapter."
                self._running.fail([request], "adapter_capacity", said, self._scheduler.retry_after())
        self._scheduler.drop(lambda request: not request.ended)

    def _expired(self, requests: list[Request], seconds: float) -> list[Request]:
        return [r for r in requests if not r.ended and time.monotonic() - r.accepted > seconds]

    # A step runs outside the lock while others submit: what it tells the scheduler must not meet theirs halfway.
    def _wrote(self, request: Request) -> None:
        with self._wake:
            self._scheduler.wrote(request)

    def _ended(self, request: Request) -> None:
        with self._wake:
            self._scheduler.ended(request)
        count = getattr(request.handle, "count", None)
        if count is not None:
            count(request.read, len(request.tokens))

    def _quarantine(self, key: str) -> None:
        if key not in self._quarantined:
            log.error("the numbers of adapter version %s overflowed; it is not served any more", key[:12])
            self._quarantined.add(key)
        self.store.quarantine(key)


def _eos(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*many, tokenizer.eos_token_id) if token is not None)
