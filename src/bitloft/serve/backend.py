"""What the engine needs of a model: rows that take tokens, and the logits behind the last of them.

Two backends: ``NativeRows`` for the models that the native decoder takes (one call a step for prompts in pieces and
single tokens together), ``batch.ModelRows`` for every other causal model, through transformers. transformers' own
continuous batching is neither: it packs all rows into one sequence, where on a CPU one row's NaN reaches the others
through the shared attention mask. In both a row attends to its own cache alone, and no two rows share one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitloft.integrations import decoder
from bitloft.modules.multi import AdapterBank


class Piece(NamedTuple):
    """The next tokens of a row, one or more, computed with the adapter ``key`` (None: the base)."""

    row: Any
    tokens: Sequence[int]
    key: str | None


@runtime_checkable
class Backend(Protocol):
    """Five methods; one thread calls them."""

    def bytes_for(self, tokens: int) -> int:
        """Memory that the cache of a row with so many tokens takes."""

    def open(self, tokens: int) -> Any:
        """A row without tokens, for so many of them at most."""

    def run(self, pieces: Sequence[Piece]) -> Float[Tensor, "pieces vocabulary"]:
        """Take the pieces, all rows that have begun to answer being among them; the logits behind each, float32.

        An error leaves the rows as they were, as long as no piece is longer than one token.
        """

    def close(self, row: Any) -> None:
        """Free a row."""

    def reset(self) -> None:
        """Forget all rows, after an error."""


class NativeRows:
    """Rows of the native decoder: each owns its memory, so that they join and leave without copying others."""

    def __init__(self, model: PreTrainedModel, bank: AdapterBank) -> None:
        self.decoder = decoder.Decoder(model, bank)

    def bytes_for(self, tokens: int) -> int:
        return self.decoder.bytes_for(tokens)

    def open(self, tokens: int) -> decoder.Row:
        return self.decoder.row(tokens)

    def run(self, pieces: Sequence[Piece]) -> Float[Tensor, "pieces vocabulary"]:
        return self.decoder.read([(p.row, p.tokens) for p in pieces], [p.key for p in pieces])

    def close(self, row: decoder.Row) -> None:
        """A row's memory goes with it."""

    def reset(self) -> None:
        """There is nothing that rows share."""
