"""Rows through transformers, for models that the native decoder does not take.

    slot:     0 1 2 3 4 5 6 7        keys, values [rows, heads, slots, width] per layer, more of both than are in use
    row 0:    . . . a b c d          mask 0 on '.', positions count from a row's own first token
    row 1:    . q r s t u v
                          ^ end      the last slot of every row is its newest token, so a step appends one slot for all

A prompt is read in pieces into a cache of its own; with its first answer token the row joins: its keys and values are
copied behind the others' rows, once. A row that leaves is replaced by the last one. Room doubles when it is used up;
when the end reaches the last slot, padding that all rows share is squeezed out first. So what a token costs in copies
is bounded, where caches that are padded, cut and concatenated anew copy everything at every join.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bitloft.errors import CheckpointError
from bitloft.modules.multi import AdapterBank
from bitloft.serve.backend import Piece

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
LEAST_SLOTS = 64


class Row:
    """One text: its own cache until it joins, then a place among the joined rows."""

    def __init__(self) -> None:
        self.length = 0
        self.cache: Any = DynamicCache()
        self.place: int | None = None


class _Layer(DynamicLayer):
    """One layer's keys and values of all joined rows, with room to grow in both directions."""

    def __init__(self, rows: "ModelRows") -> None:
        super().__init__()
        self.rows = rows
        self.room: list[Tensor] = []  # keys, values [rows, heads, slots, width]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.rows.end
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[: len(new), :, end : end + new.shape[2]] = new
        keys, values = (room[: len(key_states), :, self.rows.begin : end + key_states.shape[2]] for room in self.room)
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.rows.end - self.rows.begin

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        count = query if isinstance(query, int) else len(query)
        return self.get_seq_length() + count, 0

    def place(self, row: int, layer: tuple[Tensor, Tensor]) -> None:
        for room, own in zip(self.room, layer, strict=True):
            room[row, :, self.rows.end - own.shape[2] : self.rows.end] = own[0]

    def reserve(self, like: tuple[Tensor, Tensor], rows: int, slots: int, shift: int) -> None:
        """Room for so many rows and slots, what is there being moved ``shift`` slots to the right."""
        begin, end = self.rows.begin, self.rows.end
        grown = [own.new_zeros(rows, own.shape[1], slots, own.shape[3]) for own in like]
        for new, old in zip(grown, self.room, strict=False):
            new[: old.shape[0], :, begin + shift : end + shift] = old[:, :, begin:end]
        self.room = grown


class ModelRows:
    """A causal model as the engine uses it (``backend.Backend``). Runs without gradients."""

    def __init__(self, model: PreTrainedModel, bank: AdapterBank, *, batch_invariant: bool = False) -> None:
        """Raises CheckpointError for a model whose cache is not plain keys and values (state-space layers and such),
        and with ``batch_invariant``: the products of other layers than ours follow the size of the batch."""
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION
        if kinds:
            raise CheckpointError(
                f"a model with {', '.join(sorted(kinds))} layers cannot be served: rows could not join."
            )
        if batch_invariant:
            raise CheckpointError(
                "batch_invariant needs a model that the native decoder runs; this one goes through torch."
            )
        self.model, self.bank = model, bank
        known = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in known  # models with relative positions take none
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._bytes = _token_bytes(model, config)
        self.reset()

    def reset(self) -> None:
        self.joined: list[Row] = []
        self.begin = self.end = 0
        self._layers: list[_Layer] = []
        self._cache: Any = DynamicCache()

    def bytes_for(self, tokens: int) -> int:
        return 2 * self._bytes * tokens  # room may be twice what is in use

    def open(self, tokens: int) -> Row:
        return Row()

    def close(self, row: Row) -> None:
        if row.place is None or row.place >= len(self.joined) or self.joined[row.place] is not row:
            return
        last = self.joined.pop()
        if last is not row:
            for layer in self._layers:
                for room in layer.room:
                    room[row.place, :, self.begin : self.end] = room[last.place, :, self.begin : self.end]
            self.joined[row.place], last.place = last, row.place
        row.place = None
        self.begin = self.end - max((other.length for other in self.joined), default=0)

    @torch.no_grad()  # not inference_mode: tables that kernels cache must stay usable in training
    def run(self, pieces: Sequence[Piece]) -> Float[Tensor, "pieces vocabulary"]:
        """Prompts first, each in a forward of its own; then one token of every row that has begun to answer."""
        logits: dict[int, Tensor] = {}
        steps = [i for i, piece in enumerate(pieces) if len(piece.tokens) == 1 and piece.row.length]
        for i, piece in enumerate(pieces):
            if i not in steps:
                logits[i] = self._read(piece)
        if steps:
            for i in steps:
                self._join(pieces[i].row)
            order = sorted(steps, key=lambda i: pieces[i].row.place)
            found = self._step([pieces[i] for i in order])
            logits.update(zip(order, found, strict=True))
        return torch.stack([logits[i] for i in range(len(pieces))]).float()

    def _read(self, piece: Piece) -> Float[Tensor, " vocabulary"]:
        """Some tokens of a prompt, into the row's own cache."""
        row, count = piece.row, len(piece.tokens)
        positions = torch.arange(row.length, row.length + count)[None]
        mask = torch.ones(1, row.length + count, dtype=torch.long)
        logits = self._forward(row.cache, torch.tensor([list(piece.tokens)]), mask, positions, [piece.key])[0]
        row.length += count
        return logits

    def _step(self, pieces: Sequence[Piece]) -> Float[Tensor, "pieces vocabulary"]:
        """One token of every joined row, in the order of their places."""
        slots = self.end + 1 - self.begin
        lengths = torch.tensor([row.length + 1 for row in self.joined])
        mask = (torch.arange(slots)[None] >= slots - lengths[:, None]).long()
        ids = torch.tensor([list(piece.tokens) for piece in pieces])
        logits = self._forward(self._cache, ids, mask, lengths[:, None] - 1, [piece.key for piece in pieces])
        self.end += 1
        for row in self.joined:
            row.length += 1
        return logits

    def _forward(
        self, cache: Any, ids: Int[Tensor, "rows length"], mask: Tensor, positions: Tensor, keys: list[str | None]
    ) -> Float[Tensor, "rows vocabulary"]:
        extra: dict[str, Any] = dict(self._last_only)
        device = self.model.device
        if self._positions:
            extra["position_ids"] = positions.to(device)
        with self.bank.rows(keys):
            out = self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True, **extra
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _join(self, row: Row) -> None:
        """Make sure that ``row`` has a place, and one slot to take."""
        if row.place is None:
            own = [(layer[0], layer[1]) for layer in row.cache]
            self._reserve(own, len(self.joined) + 1, row.length)
            for layer, found in zip(self._layers, own, strict=True):
                layer.place(len(self.joined), found)
            row.place, row.cache = len(self.joined), None
            self.joined.append(row)
            self.begin = self.end - max(other.length for other in self.joined)
        elif self.end == self._layers[0].room[0].shape[2]:
            self._reserve([(layer.room[0], layer.room[1]) for layer in self._layers], len(self.joined), 0)

    def _reserve(self, like: list[tuple[Tensor, Tensor]], rows: int, length: int) -> None:
        """Room for so many rows of ``length`` tokens and one more, copied only where there is not enough."""
        if not self._layers:
            self._layers = [_Layer(self) for _ in like]
            self._cache.layers = self._layers
        have = self._layers[0].room[0].shape if self._layers[0].room else (0, 0, 0, 0)
        used = max(self.end - self.begin, length)
        fits = rows <= have[0] and self.end + 1 <= have[2] and length <= self.end
        if fits:
            return
        slots = have[2] if used + LEAST_SLOTS // 2 <= have[2] else max(LEAST_SLOTS, 2 * (used + 1))
        rows = rows if rows <= have[0] else max(rows, 2 * have[0])
        shift = used - self.end
        for layer, own in zip(self._layers, like, strict=True):
            layer.reserve(own, max(rows, have[0]), slots, shift)
        self.begin, self.end = self.begin + shift, used


def _token_bytes(model: PreTrainedModel, config: Any) -> int:
    """Bytes of one token's keys and values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * int(model.dtype.itemsize)
