"""serve/front.py without Ray: the model of a body, and what a client gets when a replica dies."""

import asyncio
from typing import Any

from bitloft.serve.front import Front, model_of


def test_models_of_bodies() -> None:
    assert model_of(b'{"model": "billing", "prompt": "x"}') == "billing"
    for odd in (b"", b"[1]", b"{", b'{"model": 3}', b"[" * 100_000, b"\xff"):
        assert model_of(odd) == ""


def test_a_replica_that_dies_is_asked_for_again_once_and_then_told() -> None:
    """A handle whose calls fail before or after their first message, without Ray."""
    calls: list[int] = []

    class Handle:
        def __init__(self, failures: int, begin: bool) -> None:
            self.failures, self.begin = failures, begin

        def options(self, **given: Any) -> "Handle":
            return self

        def remote(self, scope: Any, body: bytes) -> Any:
            calls.append(1)
            return Call(len(calls) <= self.failures, self.begin)

    class Call:
        def __init__(self, fails: bool, begin: bool) -> None:
            self.fails, self.begin = fails, begin

        async def __aiter__(self) -> Any:
            if self.fails and not self.begin:
                raise RuntimeError("the actor died")
            yield {"type": "http.response.start", "status": 200, "headers": []}
            if self.fails:
                raise RuntimeError("the actor died")
            yield {"type": "http.response.body", "body": b"whole", "more_body": False}

        def cancel(self) -> None:
            pass

    async def answer(failures: int, begin: bool) -> list[dict[str, Any]]:
        calls.clear()
        sent: list[dict[str, Any]] = []
        first = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> dict[str, Any]:
            if first:
                return first.pop()
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await Front(Handle(failures, begin))(
            {"type": "http", "path": "/v1/completions", "method": "POST"}, receive, send
        )
        return sent

    assert asyncio.run(answer(1, False))[-1]["body"] == b"whole"
    assert len(calls) == 2
    lost = asyncio.run(answer(2, False))
    assert lost[0]["status"] == 500
    assert b"the replica that worked on this request was lost" in lost[1]["body"]
    cut = asyncio.run(answer(1, True))
    assert len(calls) == 1
    assert cut[-1]["body"].endswith(b"data: [DONE]\n\n")
