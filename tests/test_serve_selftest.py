"""An engine notices at its start when rows touch each other."""

from collections.abc import Sequence

import pytest
import torch

from bitloft.errors import CheckpointError
from bitloft.serve.backend import NativeRows, Piece
from bitloft.serve.selftest import self_test
from tests.serving import World


def test_the_native_rows_pass(world: World) -> None:
    self_test(world.engine.backend, world.service.store)


def test_rows_that_touch_are_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose logits mix all rows, as a shared cache or a wrong mask would."""
    ran = NativeRows.run

    def mixed(self: NativeRows, pieces: Sequence[Piece]) -> torch.Tensor:
        found = ran(self, pieces)
        return 0.5 * found + 0.5 * found.mean(0, keepdim=True)

    monkeypatch.setattr(NativeRows, "run", mixed)
    with pytest.raises(CheckpointError, match="rows of a batch do not answer as they do alone"):
        self_test(world.engine.backend, world.service.store)
    with (
        world.engine_with() as engine,
        pytest.raises(CheckpointError, match="rows of a batch do not answer as they do alone"),
    ):
        engine.start()


def test_adapters_of_other_rows_are_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that computes every row with the first row's adapter."""
    ran = NativeRows.run

    def first(self: NativeRows, pieces: Sequence[Piece]) -> torch.Tensor:
        return ran(self, [Piece(piece.row, piece.tokens, pieces[0].key) for piece in pieces])

    monkeypatch.setattr(NativeRows, "run", first)
    with pytest.raises(CheckpointError, match="rows of a batch do not answer as they do alone"):
        self_test(world.engine.backend, world.service.store)
