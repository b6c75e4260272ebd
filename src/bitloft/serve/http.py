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
from bitloft.integrations.loading import base_record, load, load_tokenizer
from bitloft.modules.multi import AdapterBank
from bitloft.options import LOOPBACK, ServeOptions
from bitloft.serve.api import HEADER_BYTES, Service, app
from bitloft.serve.engine import Engine
from bitloft.serve.store import AdapterStore

GRACE_SECONDS = 5  # for connections to close once nothing runs any more

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
    model = load(base, activations=options.activations)
    tokenizer = load_tokenizer(base)
    name = options.name or base.resolve().name
    store = AdapterStore(AdapterBank(model), record, name, options.base_mismatch)
    if adapter_dir is not None:
        store.scan(Path(adapter_dir))
    for name in store.names:
        held = store.acquire(name)
        tell(f"adapter {name}: {held.nbytes / 1024:.0f} KiB in memory" + (f"; {held.note}" if held.note else ""))
    for name, reason in store.refused.items():
        tell(f"adapter {name} is not served: {reason}")
    return Service(Engine(model, tokenizer, store, options), store, tokenizer, options)


class Server(uvicorn.Server):
    """uvicorn that drains the engine before it stops."""

    def __init__(self, service: Service, tell: Tell = _tell) -> None:
        options = service.options
        config = uvicorn.Config(
            app(service), host=options.host, port=options.port, http="h11", ws="none", lifespan="off",
            h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=GRACE_SECONDS,
            log_level="warning", access_log=False, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self.service, self.tell = service, tell
        self._deadline: float | None = None

    @property
    def url(self) -> str:
        """Where clients reach it, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    async def main_loop(self) -> None:
        store = self.service.store
        self.tell(f"serving {store.base_name} and {len(store.names)} adapters at {self.url} (Ctrl-C stops)")
        if self.service.options.host not in LOOPBACK and self.service.options.key is None:
            self.tell("warning: no key is set, so everyone who reaches this address can use it")
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self.drain()
        else:
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
    """Engine and server from start to end. Raises BitloftError for a port that is taken."""
    service = server.service
    service.engine.start()
    try:
        server.run()
    except SystemExit:  # uvicorn's answer to a socket that it cannot open; it has logged why
        raise BitloftError(f"cannot listen on {server.config.host}:{server.config.port}; use another port.") from None
    finally:
        service.engine.stop()
        service.pool.shutdown(wait=False, cancel_futures=True)


def serve(
    base: Path | str, adapter_dir: Path | str | None = None, options: ServeOptions | None = None, tell: Tell = _tell
) -> None:
    """Serve until a signal comes; returns after an orderly end.

    Raises BitloftError children for a base, directory or option that cannot be used, and for a port that is taken.
    """
    _run(Server(open_service(base, adapter_dir, options or ServeOptions(), tell), tell))


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
