"""The rows that are computed: one step of all of them, and what becomes of their logits.

A step takes one token of every row that answers and, within ``step_tokens``, pieces of the prompts that are still being
read, in the order of their arrival: a long prompt is read over many steps, and those who answer go on beside it.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bitloft.serve.backend import Backend, Piece
from bitloft.serve.requests import Event, Request, RequestError, TokenLogprob
from bitloft.serve.sampling import Choice, choose, sound
from bitloft.serve.text import TextStream

LEAST_PIECE = 16  # tokens of a prompt that every step has room for, however many rows answer

log = logging.getLogger("bitloft.serve")


@dataclass
class Totals:
    """What has been done since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    adapters: int = 0  # in the last step


@dataclass
class Running:
    """Requests with a row each. ``unsound`` is told the key of an adapter whose numbers overflowed, ``wrote`` and
    ``ended`` every request that has a new token or its last event."""

    backend: Backend
    tokenizer: Any
    eos: frozenset[int]
    step_tokens: int
    unsound: Callable[[str], None]
    wrote: Callable[[Request], None]
    ended: Callable[[Request], None]
    totals: Totals = field(default_factory=Totals)
    requests: list[Request] = field(default_factory=list)

    @property
    def cache_bytes(self) -> int:
        """Memory that the rows have been promised."""
        return sum(self.backend.bytes_for(request.total) for request in self.requests)

    def admit(self, request: Request) -> None:
        request.row = self.backend.open(request.total)
        self.requests.append(request)

    def step(self) -> None:
        """Compute one step; a prompt that fails to be read ends alone, any other error is raised."""
        reading, pieces = self._pieces()
        taken = [*(r for r in self.requests if r.read == len(r.prompt)), *reading]
        answering = len(taken) - len(reading)
        try:
            logits = self.backend.run(pieces)
        except Exception:
            if not reading or not answering:
                raise
            log.exception("reading a prompt failed; its request ends with an error")
            self.fail(reading, "engine_error", "the engine failed on this request.")
            taken, pieces = taken[:answering], pieces[:answering]
            logits = self.backend.run(pieces)
        self._count(pieces, answering)
        for request, piece in zip(taken[answering:], pieces[answering:], strict=True):
            request.read += len(piece.tokens)
        self._advance(*_chosen(taken, logits, [request.read == len(request.prompt) for request in taken]))
        self._leave()

    def _pieces(self) -> tuple[list[Request], list[Piece]]:
        """The requests whose prompts are read in this step, and the pieces of all, those who answer first."""
        pieces = [Piece(r.row, r.tokens[-1:], r.adapter) for r in self.requests if r.read == len(r.prompt)]
        budget = max(self.step_tokens - len(pieces), LEAST_PIECE)
        reading = []
        for request in self.requests:
            left = len(request.prompt) - request.read
            count = min(left, budget)
            if not left or (count < left and count < LEAST_PIECE):  # crumbs cost a step each
                continue
            pieces.append(Piece(request.row, request.prompt[request.read : request.read + count], request.adapter))
            reading.append(request)
            budget -= count
        return reading, pieces

    def _count(self, pieces: list[Piece], answering: int) -> None:
        self.totals.steps += 1
        self.totals.prompt_tokens += sum(len(piece.tokens) for piece in pieces[answering:])
        self.totals.adapters = len({piece.key for piece in pieces})

    def _advance(self, requests: list[Request], logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Give every row its next token; a row with NaN in its logits ends alone, and its adapter is reported."""
        fine = sound(logits).tolist()
        for request in (r for r, good in zip(requests, fine, strict=True) if not good):
            if request.adapter is not None:
                self.unsound(request.adapter)
            self.fail([request], "adapter_numerical_error", "the model's numbers overflowed on this request.")
        kept, logits = _chosen(requests, logits, fine)
        for request, choice in zip(kept, choose(logits, kept), strict=True):
            self._accept(request, choice)

    def _accept(self, request: Request, choice: Choice) -> None:
        if request.first is None:
            request.first = time.monotonic()
        request.tokens.append(choice.token)
        self.totals.answer_tokens += 1
        self.wrote(request)
        told = () if choice.logprob is None else (self._told(choice),)
        request.logprobs.extend(told)
        if choice.token in self.eos:
            self._end(request, Event(request.text.finish(), "stop", logprobs=told))
            return
        text, stopped = request.text.add(choice.token)
        if stopped:
            self._end(request, Event(text, "stop", logprobs=told))
        elif len(request.tokens) >= request.sampling.max_tokens:
            self._end(request, Event(text + request.text.finish(), "length", logprobs=told))
        elif text or told:
            request.tell(Event(text, logprobs=told))

    def _told(self, choice: Choice) -> TokenLogprob:
        top = tuple((token, self._text(token), logprob) for token, logprob in choice.top)
        return TokenLogprob(choice.token, self._text(choice.token), choice.logprob or 0.0, top)

    def _text(self, token: int) -> str:
        return TextStream(self.tokenizer).decode([token])

    def _end(self, request: Request, event: Event) -> None:
        self.totals.finished += event.finish in ("stop", "length")
        self.totals.cancelled += event.finish == "cancelled"
        self.totals.failed += event.error is not None
        request.tell(event)

    def fail(self, requests: list[Request], code: str, message: str, retry_after: float | None = None) -> None:
        """End requests, running or not, with an error."""
        for request in requests:
            if not request.ended:
                self._end(request, Event(error=RequestError(code, message, None, retry_after)))

    def sweep(self) -> None:
        """Free the rows of requests that ended or that nobody waits for."""
        self.cancel(self.requests)
        self._leave()

    def cancel(self, requests: list[Request]) -> None:
        """Give those that were cancelled their last event."""
        for request in requests:
            if request.cancelled and not request.ended:
                self._end(request, Event(finish="cancelled"))

    def _leave(self) -> None:
        for request in [request for request in self.requests if request.ended]:
            self.requests.remove(request)
            self.backend.close(request.row)
            request.row = None
            self.ended(request)

    def restart(self, code: str, message: str) -> None:
        """After an error: every request ends, and the backend begins anew."""
        left, self.requests = self.requests, []
        self.backend.reset()
        for request in left:
            request.row = None
            self.ended(request)
        self.fail(left, code, message)


def _chosen(
    requests: list[Request], logits: Float[Tensor, "rows vocabulary"], wanted: list[bool]
) -> tuple[list[Request], Float[Tensor, "some vocabulary"]]:
    """Those that are wanted and their rows. Mostly that is all of them: a copy of the rows would be megabytes."""
    if all(wanted):
        return requests, logits
    rows = [i for i, one in enumerate(wanted) if one]
    return [requests[i] for i in rows], logits[rows]
