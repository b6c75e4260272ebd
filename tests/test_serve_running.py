"""One step of all rows: what is read, what is answered, who ends and who is told."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bitloft.serve.backend import Piece
from bitloft.serve.requests import Event, Request, Sampling
from bitloft.serve.running import LEAST_PIECE, Running
from bitloft.serve.store import Handle
from bitloft.serve.text import TextStream

EOS = 9


class Letters:
    """A tokenizer whose token i is one letter."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i) for i in ids)


class Script:
    """A backend that answers each row's next token with the number of tokens that the row has."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int]]] = []
        self.closed: list[Any] = []
        self.resets = 0
        self.broken: set[str | None] = set()
        self.nan: set[str | None] = set()

    def bytes_for(self, tokens: int) -> int:
        return tokens

    def open(self, tokens: int) -> dict[str, int]:
        return {"length": 0}

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        if any(piece.key in self.broken and len(piece.tokens) > 1 for piece in pieces):
            raise RuntimeError("broken")
        logits = torch.zeros(len(pieces), 12)
        for found, piece in zip(logits, pieces, strict=True):
            piece.row["length"] += len(piece.tokens)
            found[piece.row["length"] % 12] = torch.nan if piece.key in self.nan else 1.0
        self.steps.append([(piece.row["length"], len(piece.tokens)) for piece in pieces])
        return logits

    def close(self, row: Any) -> None:
        self.closed.append(row)

    def reset(self) -> None:
        self.resets += 1


class Case:
    def __init__(self, step_tokens: int = 64) -> None:
        self.backend, self.unsound, self.ended = Script(), list[str](), list[Request]()
        self.running = Running(
            self.backend, Letters(), frozenset({EOS}), step_tokens, self.unsound.append, lambda request: None,
            self.ended.append,
        )  # fmt: skip

    def ask(self, prompt: int, tokens: int = 3, adapter: str | None = None, **sampling: Any) -> Request:
        loop = asyncio.get_running_loop()
        handle = Handle(adapter or "base", adapter)
        text = TextStream(Letters(), sampling.get("stop", ()))
        request = Request([0] * prompt, handle, Sampling(tokens, **sampling), text, loop)
        self.running.admit(request)
        return request


def run(test: Any) -> Any:
    async def inside() -> Any:
        return await test()

    return asyncio.run(inside())


def test_pieces_share_a_step_with_those_who_answer() -> None:
    async def steps() -> None:
        case = Case(step_tokens=64)
        short = case.ask(3, 6)
        case.running.step()
        long = case.ask(150, 2)
        for _ in range(3):
            case.running.step()
        assert case.backend.steps == [[(3, 3)], [(4, 1), (63, 63)], [(5, 1), (126, 63)], [(6, 1), (150, 24)]]
        assert short.tokens == [3, 4, 5, 6]
        assert len(long.tokens) == 1
        assert (case.running.totals.prompt_tokens, case.running.totals.steps) == (153, 4)
        assert case.running.cache_bytes == 9 + 152

    run(steps)


def test_many_who_answer_leave_room_to_read() -> None:
    async def steps() -> None:
        case = Case(step_tokens=4)
        for _ in range(8):
            case.ask(1, 7)
        for _ in range(2):
            case.running.step()
        case.ask(40, 2)
        case.running.step()
        assert case.backend.steps[-1][-1] == (LEAST_PIECE, LEAST_PIECE)

    run(steps)


def test_a_crumb_of_room_is_not_used() -> None:
    async def steps() -> None:
        case = Case(step_tokens=40)
        case.ask(30, 2)
        case.ask(30, 2)
        case.running.step()
        assert case.backend.steps == [[(30, 30)]]  # ten tokens of the second would cost a step of their own
        case.running.step()
        assert case.backend.steps[1] == [(31, 1), (30, 30)]

    run(steps)


def test_the_ends() -> None:
    async def steps() -> None:
        case = Case()
        by_length, by_token, by_text = case.ask(2, 2), case.ask(8, 5), case.ask(3, 5, stop=("de",))
        for _ in range(4):
            case.running.step()
        assert await by_length.collect() == ("cd", "length")
        assert await by_token.collect() == ("i", "stop")
        assert await by_text.collect() == ("", "stop")
        assert case.ended == [by_length, by_token, by_text]
        assert len(case.backend.closed) == 3
        assert case.running.totals.finished == 3
        assert by_length.first is not None
        assert by_length.finished is not None
        assert by_length.accepted <= by_length.first <= by_length.finished

    run(steps)


def test_nan_ends_a_row_and_tells_of_its_adapter() -> None:
    async def steps() -> None:
        case = Case()
        case.backend.nan = {"bad"}
        bad, good, base = case.ask(2, 2, "bad"), case.ask(2, 2, "good"), case.ask(2, 2)
        case.running.step()
        case.running.step()
        assert case.unsound == ["bad"]
        with pytest.raises(Exception, match="numbers overflowed"):
            await bad.collect()
        assert (await good.collect())[0] == (await base.collect())[0] == "cd"
        assert case.running.totals.failed == 1

    run(steps)


def test_a_prompt_that_fails_and_a_step_that_fails() -> None:
    async def steps() -> None:
        case = Case()
        case.backend.broken = {"broken"}
        running = case.ask(2, 4)
        case.running.step()
        broken = case.ask(5, 2, "broken")
        case.running.step()
        assert broken.ended
        assert running.tokens == [2, 3]
        lonely = Case()
        lonely.backend.broken = {"broken"}
        lonely.ask(5, 2, "broken")
        with pytest.raises(RuntimeError, match="broken"):
            lonely.running.step()
        lonely.running.restart("engine_error", "the engine failed.")
        assert lonely.running.requests == []
        assert lonely.backend.resets == 1
        assert len(lonely.ended) == 1

    run(steps)


def test_the_cancelled_leave() -> None:
    async def steps() -> None:
        case = Case()
        gone, stays = case.ask(2, 5), case.ask(2, 5)
        case.running.step()
        gone.cancel()
        case.running.sweep()
        assert case.running.requests == [stays]
        assert [event async for event in gone][-1] == Event("c", "cancelled")
        assert case.running.totals.cancelled == 1

    run(steps)
