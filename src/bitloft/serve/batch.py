"""Rows that decode together: one KV cache, left-padded, that rows join and leave between steps.

    slot:     0 1 2 3 4 5 6          keys, values [rows, heads, slots, width] per layer
    row 0:    . . . a b c d          mask 0 on '.', positions count from a row's own first token
    row 1:    . q r s t u v

The last slot of every row is its newest token, so a step appends one slot for all; to join, the shorter side is padded
on the left; when rows leave, slots that are padding everywhere are dropped. The alternative, transformers' continuous
batching over pages, packs all rows into one sequence, where one row's NaN reaches the others through the shared
attention mask (seen on CPU); here a row only ever attends to its own cache.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from bitloft.errors import CheckpointError
from bitloft.modules.multi import AdapterBank
from bitloft.serve.requests import Request

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class Batch:
    """Requests that have been prefilled, with their cache."""

    def __init__(self, requests: list[Request], cache: DynamicCache, mask: Int[Tensor, "rows slots"]) -> None:
        self.requests, self.cache, self.mask = requests, cache, mask

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def slots(self) -> int:
        return self.mask.shape[1]

    def keep(self, rows: list[int]) -> "Batch":
        """These rows, and only as many slots as the longest of them has."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        longest = int(mask.sum(1).max()) if rows else 0
        first = self.slots - longest
        layers = [(k[index, :, first:], v[index, :, first:]) for k, v, _ in self.cache]
        return Batch([self.requests[i] for i in rows], DynamicCache(layers), mask[:, first:])

    def join(self, other: "Batch") -> "Batch":
        """The rows of both, this batch's first."""
        if not len(self) or not len(other):
            return self if len(self) else other
        slots = max(self.slots, other.slots)
        layers = []
        for mine, theirs in zip(self.cache, other.cache, strict=True):
            pairs = [(_padded(a, slots), _padded(b, slots)) for a, b in zip(mine[:2], theirs[:2], strict=True)]
            layers.append((torch.cat(pairs[0]), torch.cat(pairs[1])))
        masks = [pad(batch.mask, (slots - batch.slots, 0)) for batch in (self, other)]
        return Batch(self.requests + other.requests, DynamicCache(layers), torch.cat(masks))


def _padded(x: Float[Tensor, "rows heads slots width"], slots: int) -> Float[Tensor, "rows heads more width"]:
    return pad(x, (0, 0, slots - x.shape[2], 0))


class Runner:
    """The model as the engine uses it: prompts to a batch, a batch to its next logits. Runs without gradients."""

    def __init__(self, model: PreTrainedModel, bank: AdapterBank) -> None:
        """Raises CheckpointError for a model whose cache is not plain keys and values (state-space layers and such)."""
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION
        if kinds:
            raise CheckpointError(
                f"a model with {', '.join(sorted(kinds))} layers cannot be served: rows could not join."
            )
        self.model, self.bank = model, bank
        known = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in known  # models with relative positions take none
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def empty(self) -> Batch:
        return Batch([], DynamicCache(), torch.zeros(0, 0, dtype=torch.long, device=self.model.device))

    def prefill(self, requests: list[Request]) -> tuple[Batch, Float[Tensor, "rows vocabulary"]]:
        """Read the prompts in one forward; returns their batch and the logits of the first answer tokens."""
        longest = max(len(request.prompt) for request in requests)
        ids = [[0] * (longest - len(request.prompt)) + request.prompt for request in requests]
        mask = [[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in requests]
        batch = Batch(requests, DynamicCache(), self._tensor(mask))
        return batch, self._forward(batch, self._tensor(ids))

    def step(self, batch: Batch) -> Float[Tensor, "rows vocabulary"]:
        """Append every row's newest token to the cache; returns the logits of the next ones."""
        batch.mask = pad(batch.mask, (0, 1), value=1)
        return self._forward(batch, self._tensor([[request.tokens[-1]] for request in batch.requests]))

    @torch.no_grad()  # not inference_mode: tables that kernels cache must stay usable in training
    def _forward(self, batch: Batch, ids: Int[Tensor, "rows length"]) -> Float[Tensor, "rows vocabulary"]:
        extra: dict[str, Any] = dict(self._last_only)
        if self._positions:
            extra["position_ids"] = (batch.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with self.bank.rows([request.adapter for request in batch.requests]):
            out = self.model(
                input_ids=ids, attention_mask=batch.mask, past_key_values=batch.cache, use_cache=True, **extra
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _tensor(self, values: list[list[int]]) -> Int[Tensor, "rows length"]:
        return torch.tensor(values, dtype=torch.long, device=self.model.device)
