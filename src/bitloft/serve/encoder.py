"""Classification and embedding models: texts in, one vector each out, mixed adapters in one forward.

There is nothing to decode, so there are no rows to keep: what waits when a forward ends is the next batch, the longest
waiting first, padded to its longest text. The thread is ``worker``'s, as the engine's is.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitloft.errors import CheckpointError
from bitloft.options import ServeOptions
from bitloft.serve.requests import RequestError
from bitloft.serve.store import AdapterStore, Handle
from bitloft.serve.worker import Worker

CLASSIFIER = "ForSequenceClassification"
BATCH_TOKENS = 4096  # padded tokens of one forward


@dataclass(frozen=True)
class Encoded:
    """What came of one text: ``embedding`` of unit length, or ``logits`` and their ``probabilities`` (each by itself
    for a model of several labels at once); the other kind's are empty."""

    embedding: list[float]
    logits: list[float]
    probabilities: list[float]
    tokens: int


@dataclass(frozen=True)
class EncoderStats:
    running: int
    waiting: int
    batches: int
    rows: int
    tokens: int
    refused: dict[str, int]
    last_step_age: float


@dataclass(eq=False)
class _Text:
    """One text that waits, with where its result goes."""

    ids: list[int]
    handle: Handle
    future: "asyncio.Future[Encoded]"
    loop: asyncio.AbstractEventLoop
    accepted: float = field(default_factory=time.monotonic)

    def tell(self, result: "Encoded | RequestError") -> None:
        self.handle.release()
        try:
            self.loop.call_soon_threadsafe(self._set, result)
        except RuntimeError:  # the loop was closed: nobody waits
            return

    def _set(self, result: "Encoded | RequestError") -> None:
        if self.future.done():
            return
        if isinstance(result, RequestError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether ``model`` gives a vector a text instead of text: a classifier, or a body without a head."""
    return type(model).__name__.endswith(CLASSIFIER) or not model.can_generate()


class Encoder(Worker):
    """Texts in, vectors out. ``run`` on an event loop; everything else from any thread."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, store: AdapterStore, options: ServeOptions) -> None:
        """Raises CheckpointError for a model that gives neither classes nor hidden states, OptionError for a context
        beyond its own."""
        if not is_encoder(model) or model.config.is_encoder_decoder:
            raise CheckpointError(f"a {type(model).__name__} gives no vector for a text; it is served by the engine.")
        super().__init__(model, tokenizer, store, options, "bitloft-encoder")
        classifier = type(model).__name__.endswith(CLASSIFIER)
        self.kind = "classify" if classifier else "embed"
        names = getattr(model.config, "id2label", None) or {}
        self.labels: tuple[str, ...] = tuple(str(names[i]) for i in sorted(names)) if classifier else ()
        self._waiting: deque[_Text] = deque()
        self._batch: list[_Text] = []
        self._batches = self._rows = self._tokens = 0

    @property
    def running(self) -> int:
        return len(self._batch)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def stats(self) -> EncoderStats:
        age = time.monotonic() - self._beat
        return EncoderStats(
            self.running, self.waiting, self._batches, self._rows, self._tokens, dict(self._refused), age
        )

    async def run(self, prompt: list[int], adapter: str | None) -> Encoded:
        """The vector of one text of token ids, by an adapter's name (None is the base).

        Raises RequestError: model_not_found, invalid_value, context_length_exceeded, queue_full, adapter_capacity,
        adapter_invalid, adapter_numerical_error, queue_timeout, shutting_down.
        """
        loop = asyncio.get_running_loop()
        try:
            text = self._queued(prompt, adapter, loop)
        except RequestError as error:
            self._refused[error.code] += 1
            raise
        return await text.future

    def _queued(self, prompt: list[int], adapter: str | None, loop: asyncio.AbstractEventLoop) -> _Text:
        self._require_open()
        self.store.find(adapter)
        self._require_tokens(prompt, "text", "input")
        if len(prompt) > self.context:
            raise RequestError(
                "context_length_exceeded",
                f"a text has {len(prompt)} tokens, this model's context {self.context}.",
                "input",
            )
        with self._wake:
            self._require_open()
            if len(self._waiting) >= self.options.max_queue:
                raise RequestError(
                    "queue_full", f"{len(self._waiting)} texts are waiting already; try again shortly.", None, 1.0
                )
            text = _Text(prompt, self.store.acquire(adapter), loop.create_future(), loop)
            self._waiting.append(text)
            self._wake.notify()
        return text

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Make the texts whose adapters are there the batch."""
        self._drop()
        self._batch = self._next()
        taken = set(self._batch)
        self._waiting = deque(text for text in self._waiting if text not in taken)
        return bool(self._batch)

    def _turn(self) -> None:
        self._compute(self._batch)
        self._clear()

    def _failed(self) -> None:
        for text in self._batch:
            text.tell(RequestError("engine_error", "the engine failed on this text."))
        self._clear()

    def _clear(self) -> None:
        with self._wake:
            self._batch = []

    def _end(self) -> None:
        with self._wake:
            left, self._waiting = list(self._waiting), deque()
        for text in left:
            text.tell(RequestError("shutting_down", "the server is shutting down."))

    def _next(self) -> list[_Text]:
        found: list[_Text] = []
        longest = 0
        for text in self._waiting:
            if not text.handle.ready():
                continue
            longest = max(longest, len(text.ids))
            if found and (len(found) == self.options.max_batch or longest * (len(found) + 1) > BATCH_TOKENS):
                break
            found.append(text)
        return found

    def _drop(self) -> None:
        """End those that nobody waits for, that waited too long, or whose adapter does not come."""
        kept: deque[_Text] = deque()
        for text in self._waiting:
            late = time.monotonic() - text.accepted > self.options.queue_seconds
            code = "queue_timeout" if text.handle.ready() else "adapter_capacity"
            error = text.handle.failure or (
                RequestError(code, f"the text waited longer than {self.options.queue_seconds:g} s.") if late else None
            )
            if text.future.cancelled():
                text.handle.release()
            elif error is not None:
                text.tell(error)
            else:
                kept.append(text)
        self._waiting = kept

    def _compute(self, batch: list[_Text]) -> None:
        found = self._vectors(batch)
        fine = torch.isfinite(found).all(-1).tolist()
        self._batches += 1
        self._rows += len(batch)
        self._tokens += sum(len(text.ids) for text in batch)
        for text, row, good in zip(batch, found, fine, strict=True):
            if good:
                text.handle.count(len(text.ids), 0)
                text.tell(self._encoded(row, len(text.ids)))
                continue
            if text.handle.key is not None:
                self.store.quarantine(text.handle.key)
            text.tell(RequestError("adapter_numerical_error", "the model's numbers overflowed on this text."))

    @torch.no_grad()
    def _vectors(self, batch: list[_Text]) -> Float[Tensor, "rows width"]:
        """Logits, or the mean of the last hidden states over each text's own tokens, float32."""
        longest = max(len(text.ids) for text in batch)
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.tensor([text.ids + [pad] * (longest - len(text.ids)) for text in batch]).to(self.model.device)
        lengths = torch.tensor([len(text.ids) for text in batch], device=self.model.device)
        mask = (torch.arange(longest, device=ids.device)[None] < lengths[:, None]).long()
        with self.store.bank.rows([text.handle.key for text in batch]):
            out = self.model(input_ids=ids, attention_mask=mask)
        if self.kind == "classify":
            logits: Tensor = out.logits
            return logits.float()
        states = out.last_hidden_state.float().masked_fill(mask[..., None] == 0, 0.0)
        mean: Tensor = states.sum(1) / lengths[:, None]
        return torch.nn.functional.normalize(mean, dim=-1)

    def _encoded(self, row: Float[Tensor, " width"], tokens: int) -> Encoded:
        if self.kind == "embed":
            return Encoded(row.tolist(), [], [], tokens)
        several = getattr(self.model.config, "problem_type", None) == "multi_label_classification"
        probabilities = row.sigmoid() if several else row.softmax(-1)
        return Encoded([], row.tolist(), probabilities.tolist(), tokens)
