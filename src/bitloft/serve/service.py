"""What all routes share: engine, store, tokenizer, figures; and how a body is read within its limits."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest

from bitloft.options import ServeOptions
from bitloft.serve.bodies import Kind, parse
from bitloft.serve.encoder import Encoder
from bitloft.serve.engine import Engine
from bitloft.serve.metrics import Metrics
from bitloft.serve.requests import RequestError
from bitloft.serve.store import AdapterStore
from bitloft.tasks.chat import encode_chat

BODY_BYTES = 1 << 20
BODY_SECONDS = 15.0


@dataclass
class Service:
    """What the routes work with. Prompts are tokenized one after the other in a thread of their own, and so is the work
    of admin routes: neither holds up the event loop, and two of a kind never run into each other."""

    engine: Engine | Encoder
    store: AdapterStore
    tokenizer: Any
    options: ServeOptions
    adapter_dir: Path | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine, self.store)
        self._tokenizing = ThreadPoolExecutor(1, "bitloft-tokenize")
        self._admin = ThreadPoolExecutor(1, "bitloft-admin")

    async def tokens(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself; ids stay as they are."""
        return prompt if isinstance(prompt, list) else await self._in(self._tokenizing, self._encode, prompt)

    async def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, open for the assistant's turn. Raises DataError where the template refuses."""
        found: list[int] = await self._in(self._tokenizing, encode_chat, self.tokenizer, messages, True)
        return found

    async def administer(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run the blocking ``work`` of an admin route."""
        return await self._in(self._admin, work, *args)

    def close(self) -> None:
        """End the threads. The store is whose it was made by: others may serve from it too."""
        for pool in (self._tokenizing, self._admin):
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


async def read(request: HttpRequest, kind: type[Kind]) -> Kind:
    """The body, within limits of size and time. A JSON content type keeps web pages from posting here unasked."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError("unsupported_media_type", "send the body as application/json.")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > BODY_BYTES:
                    raise RequestError("body_too_large", f"the body is larger than {BODY_BYTES} bytes.")
    except TimeoutError:
        raise RequestError("body_timeout", f"the body did not arrive within {BODY_SECONDS:g} s.") from None
    return parse(kind, bytes(data))
