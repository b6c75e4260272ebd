"""What an engine checks of its backend before it takes requests: a few tokens, less than a second.

Rows must not touch each other: what a row gives beside others, of another adapter and another length, must be what it
gives alone, to rounding. That is a promise of the backend's attention, which a new version of a library could break in
silence.
"""

import torch

from bitloft.errors import CheckpointError
from bitloft.serve.backend import Backend, Piece
from bitloft.serve.store import AdapterStore

PROMPTS = ([1, 2, 3, 4, 5], [3, 1], [2])
TOLERANCE = 0.02  # of the largest logit: another number of rows rounds differently


def self_test(backend: Backend, store: AdapterStore) -> None:
    """Raise CheckpointError where rows of the backend touch each other."""
    name = next((card.name for card in store.cards() if card.resident and not card.quarantined), None)
    with store.holding(name, None, name) as keys:
        _compare(backend, keys)


def _compare(backend: Backend, keys: list[str | None]) -> None:
    alone = [_run(backend, [prompt], [own])[0] for prompt, own in zip(PROMPTS, keys, strict=True)]
    together = _run(backend, list(PROMPTS), keys)
    for own, found in zip(alone, together, strict=True):
        if not bool(torch.isfinite(own).all()):
            continue  # an adapter that overflows on these tokens: its requests will say so
        if float((found - own).abs().max()) > TOLERANCE * max(float(own.abs().max()), 1e-6):
            raise CheckpointError(
                "rows of a batch do not answer as they do alone with this model; it cannot be served."
            )


def _run(backend: Backend, prompts: list[list[int]], keys: list[str | None]) -> list[torch.Tensor]:
    """The logits behind each prompt and one more token, all rows in the same steps."""
    rows = [backend.open(len(prompt) + 1) for prompt in prompts]
    try:
        backend.run([Piece(row, prompt, key) for row, prompt, key in zip(rows, prompts, keys, strict=True)])
        return list(backend.run([Piece(row, [1], key) for row, key in zip(rows, keys, strict=True)]))
    finally:
        for row in rows:
            backend.close(row)
