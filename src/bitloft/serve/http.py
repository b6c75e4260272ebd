"""The serve verb: a base and a directory of adapters become a server that ends in order.

SIGTERM or Ctrl-C: readiness turns 503 and new requests are refused at once, what runs is finished for
``drain_seconds``, what is left then ends with an error; a second signal ends at once. uvicorn's own lifespan hook is
called only after all streams have ended, so it cannot do this.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from bitloft.errors import BitloftError
from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.modules.multi import AdapterBank
from bitloft.options import LOOPBACK, ServeOptions
from bitloft.serve.api import app
from bitloft.serve.connection import PatientProtocol, allow_files, listen
from bitloft.serve.encoder import Encoder, is_encoder
from bitloft.serve.engine import Engine
from bitloft.serve.guard import HEADER_BYTES
from bitloft.serve.service import Service
from bitloft.serve.store import AdapterStore

GRACE_SECONDS = 5  # for connections to close once nothing runs any more
LISTED = 20  # adapters that are told one by one at the start

Tell = Callable[[str], None]


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def open_service(
    base: Path | str, adapter_dir: Path | str | None, options: ServeOptions, tell: Tell = _tell
) -> Service:
    """Load the base and every adapter below ``adapter_dir``; the engine is not started.

    Tells what is served, and what was refused and why.

    Raises CheckpointError for a base that cannot be served or a missing adapter directory.
    """
    base = Path(base)
    record = base_record(base)
    model = load(base, batch_invariant=options.batch_invariant, activations=options.activations)
    tokenizer = load_tokenizer(base)
    name = options.name or base.resolve().name
    store = AdapterStore(AdapterBank(model), record, name, options)
    if adapter_dir is not None:
        store.scan(Path(adapter_dir))
    cards = store.cards()
    for card in cards[:LISTED]:
        tell(f"adapter {card.name}: {card.nbytes / 1024:.0f} KiB in memory" + (f"; {card.note}" if card.note else ""))
    if len(cards) > LISTED:
        tell(f"and {len(cards) - LISTED} more adapters")
    for name, reason in store.refused.items():
        tell(f"adapter {name} is not served: {reason}")
    engine = (Encoder if is_encoder(model) else Engine)(model, tokenizer, store, options)
    return Service(engine, store, tokenizer, options, None if adapter_dir is None else Path(adapter_dir))


class Server(uvicorn.Server):
    """uvicorn that drains the engine before it stops."""

    def __init__(self, service: Service, tell: Tell = _tell) -> None:
        """Raises BitloftError for an address that cannot be listened on."""
        options = service.options
        protocol = type("Protocol", (PatientProtocol,), {"cap": allow_files()})
        config = uvicorn.Config(
            app(service), host=options.host, port=options.port, http=protocol, ws="none", lifespan="off",
            h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=GRACE_SECONDS,
            log_level="warning", access_log=False, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self.service, self.tell = service, tell
        self.sockets = listen(options.host, options.port)
        self._deadline: float | None = None

    @property
    def url(self) -> str:
        """Where clients reach it."""
        host, port = self.sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    async def main_loop(self) -> None:
        store = self.service.store
        self.tell(f"serving {store.base_name} and {len(store.names)} adapters at {self.url} (Ctrl-C stops)")
        if self.service.options.page:
            self.tell(f"page at {self.url.removesuffix('v1')}")
        if self.service.options.host not in LOOPBACK and self.service.options.key is None:
            self.tell("warning: no key is set, so everyone who reaches this address can use it")
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self.drain()
        else:
            self.service.engine.stop(wait=False)
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Refuse new requests, finish what runs within ``drain_seconds``, then stop."""
        self.service.engine.drain()
        self._deadline = time.monotonic() + self.service.options.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        engine = self.service.engine
        if self._deadline is not None and (engine.idle or time.monotonic() > self._deadline):
            engine.stop(wait=False)  # what is left ends with an error frame; connections then close within the grace
            self.should_exit = True
        return await super().on_tick(counter)


def _run(server: Server) -> None:
    """Engine and server from start to end. Raises BitloftError where a second signal cut it short."""
    service = server.service
    try:
        service.engine.start()
        server.run(sockets=server.sockets)
    finally:
        service.engine.stop(wait=not server.force_exit)
        service.close()
        for one in server.sockets:
            one.close()
    if server.force_exit:
        raise BitloftError("a second signal ended the server at once; what was running is cut off.")


def serve(
    base: Path | str, adapter_dir: Path | str | None = None, options: ServeOptions | None = None, tell: Tell = _tell
) -> None:
    """Serve until a signal comes; returns after an orderly end.

    Raises BitloftError children for a base, directory or option that cannot be used, for an address that is taken, and
    where a second signal cut the end short.
    """
    service = open_service(base, adapter_dir, options or ServeOptions(), tell)
    try:
        _run(Server(service, tell))
    finally:
        service.store.close()


@contextmanager
def background(service: Service, tell: Tell = _tell) -> Iterator[Server]:
    """A server in a thread of this process, stopped at the end of the block; its ``url`` is ready for clients."""
    server, failures = Server(service, tell), list[Exception]()

    def run() -> None:
        try:
            _run(server)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="bitloft-server", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if failures:
            raise failures[0]
        yield server
    finally:
        service.engine.stop(wait=False)
        server.should_exit = True
        thread.join()
