"""The serve verb on Ray Serve: replicas of the whole server as a deployment, one front that passes requests on.

    client -> front (uvicorn, in this process) -> handle, by adapter (routing.py) -> replica: the ASGI app, the engine

A replica runs the same application as a server on one machine, fed with ASGI messages instead of a socket, so keys,
limits, errors and streams are the same and are written once. The front reads one field of the body, the model. It is
not Serve's own proxy: that closes neither slowly nor in the order that a drain needs, and here SIGTERM means what it
means elsewhere. A client that leaves ends its call, which reaches the engine as a disconnect. A replica that dies
before it has answered costs a second attempt on another; one that dies in a stream ends it with an error.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from bitloft.errors import BitloftError, OptionError
from bitloft.integrations.loading import base_record
from bitloft.integrations.ray import Cluster, connected
from bitloft.options import ServeOptions
from bitloft.serve.api import app
from bitloft.serve.http import open_service
from bitloft.serve.requests import RequestError
from bitloft.serve.shapes import DONE, error_body, error_response, frame

APP = "bitloft"
BODY_BYTES = 1 << 20
READY_SECONDS = 600.0  # for replicas to load their base
END_SECONDS = 10.0  # for an application to end after its client has gone
ATTEMPTS = 2  # replicas that a request is given to, where the first died before it answered

Message = dict[str, Any]
Tell = Callable[[str], None]
log = logging.getLogger("bitloft")


@dataclass(frozen=True)
class Replicas:
    """How many replicas run: ``least`` to ``most`` as requests ask for (``most`` None: always ``least``), each with
    ``threads`` processors. Raises OptionError for numbers that cannot be."""

    least: int = 1
    most: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.least < 1 or self.threads < 1 or (self.most is not None and self.most < self.least):
            raise OptionError(
                f"replicas are {self.least} to {self.most or self.least} with {self.threads} threads; use 1 or more, "
                "and no fewer at most than at least."
            )


class Replica:
    """One server without a socket: base, adapters, engine, and the application over them."""

    def __init__(self, base: str, adapter_dir: str | None, options: ServeOptions, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.service = open_service(base, adapter_dir, options, log.info)
        self.app: Any = app(self.service)
        self.service.engine.start()

    async def ask(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """The ASGI messages that answer a request; leaving early tells the application that its client has gone."""
        told: asyncio.Queue[Message | None] = asyncio.Queue()
        gone, given = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(scope, receive, told.put)
            finally:
                await told.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await told.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            with suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), END_SECONDS)
            task.cancel()

    async def load(self) -> dict[str, int]:
        """Requests that run and that wait."""
        engine = self.service.engine
        return {"running": int(engine.running), "waiting": int(engine.waiting)}

    def check_health(self) -> None:
        """Raises for an engine that does not answer: Serve then starts another replica."""
        reason = self.service.engine.unready()
        if reason is not None and not self.service.engine.draining:
            raise RuntimeError(reason)

    def __del__(self) -> None:
        service = getattr(self, "service", None)
        if service is not None:
            service.engine.stop(wait=False)


def deploy(
    ray: Any, base: Path, adapter_dir: Path | None, options: ServeOptions, replicas: Replicas, name: str = APP
) -> Any:
    """Start the deployment and return a handle, when every one of the ``least`` replicas is ready.

    Raises BitloftError where replicas do not come up.
    """
    from ray import serve

    many = replicas.most is not None and replicas.most > replicas.least
    scaled: dict[str, Any] = {"num_replicas": replicas.least}
    if many:
        scaled = {
            "autoscaling_config": {
                "min_replicas": replicas.least, "max_replicas": replicas.most,
                "target_ongoing_requests": options.max_batch,
            }
        }  # fmt: skip
    made = serve.deployment(
        name="replica",
        max_ongoing_requests=options.max_batch + options.max_queue,
        graceful_shutdown_timeout_s=options.drain_seconds,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": replicas.threads},
        request_router_config=_routing(),
        **scaled,
    )(Replica)
    inner = replace(options, port=1)  # no replica listens
    bound = made.bind(str(base), None if adapter_dir is None else str(adapter_dir), inner, replicas.threads)
    serve.start(proxy_location="Disabled")
    try:
        return serve.run(bound, name=name, route_prefix=None, logging_config={"log_level": "ERROR"})
    except (RuntimeError, TimeoutError) as error:
        why = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise BitloftError(
            f"the replicas did not start ({why}); `bitloft serve` without --engine tells more."
        ) from error


def _routing() -> Any:
    """Serve's setting for our router, which it would send as a copy of its module's code; nodes have the package."""
    from ray import cloudpickle
    from ray.serve.config import RequestRouterConfig

    from bitloft.serve.routing import RendezvousRouter

    return RequestRouterConfig(
        request_router_class=f"{RendezvousRouter.__module__}.{RendezvousRouter.__name__}",
        _serialized_request_router_cls=cloudpickle.dumps(RendezvousRouter),
    )


class Front:
    """The ASGI application that passes requests on to replicas."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle.options(method_name="ask", stream=True)
        self.running = 0
        self.draining = False

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if self.draining and scope["path"] != "/health/live":
            refusal = RequestError("shutting_down", "the server is shutting down; ask another one.")
            response = error_response(refusal)
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        self.running += 1
        try:
            body = await _body(receive)
            if body is None:
                refusal = RequestError("body_too_large", f"the body is larger than {BODY_BYTES} bytes.")
                await error_response(refusal)(scope, receive, send)
                return
            await self._pass_on(scope, body, receive, send)
        finally:
            self.running -= 1

    async def _pass_on(self, scope: Message, body: bytes, receive: Any, send: Any) -> None:
        """Give the request to a replica, to another where that died in silence, and its answer to the client."""
        plain = {key: scope[key] for key in PLAIN if key in scope}
        gone = asyncio.create_task(_until_gone(receive))
        begun = False
        try:
            for attempt in range(ATTEMPTS):
                call = self.handle.options(multiplexed_model_id=model_of(body)).remote(plain, body)
                try:
                    async for message in _until(call, gone):
                        begun = True
                        await send(message)
                    return
                except Exception as error:  # Ray's own, whatever became of the replica
                    if not begun and attempt + 1 < ATTEMPTS:
                        continue
                    log.warning("a replica did not answer: %s", str(error).strip().splitlines()[:1])
                    await _broken(scope, begun, receive, send)
                    return
        finally:
            gone.cancel()


# what an application may ask of an ASGI scope, without what cannot travel
PLAIN = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
         "client", "server")  # fmt: skip


def model_of(body: bytes) -> str:
    """The model that a request names, which decides its replica; empty where it names none."""
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return ""
    name = found.get("model") if isinstance(found, dict) else None
    return name[:128] if isinstance(name, str) else ""


async def _body(receive: Any) -> bytes | None:
    """The request's body, None where it is too large."""
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(data)
        data += message.get("body", b"")
        if len(data) > BODY_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(data)


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until(call: Any, gone: "asyncio.Task[None]") -> AsyncIterator[Message]:
    """Messages of a call, until they end or the client has gone; then the call is cancelled."""
    messages = aiter(call)
    try:
        while True:
            coming: asyncio.Future[Message] = asyncio.ensure_future(anext(messages))
            both: set[asyncio.Future[Any]] = {coming, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        call.cancel()


async def _broken(scope: Message, begun: bool, receive: Any, send: Any) -> None:
    """End an answer whose replica died: as an error where nothing was sent, else as the stream's last frame."""
    error = RequestError("engine_error", "the replica that worked on this request was lost; ask again.")
    if not begun:
        await error_response(error)(scope, receive, send)
        return
    last = (frame(error_body(error)) + DONE).encode()
    await send({"type": "http.response.body", "body": last, "more_body": False})


class FrontServer(uvicorn.Server):
    """uvicorn that, told to stop, refuses new requests and lets the running ones end within ``drain_seconds``."""

    def __init__(self, front: Front, options: ServeOptions, tell: Tell) -> None:
        config = uvicorn.Config(
            front, host=options.host, port=options.port, http="h11", ws="none", lifespan="off",
            h11_max_incomplete_event_size=16 << 10, timeout_graceful_shutdown=5, log_level="warning",
            access_log=False, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self.front, self.options, self.tell = front, options, tell
        self._deadline: float | None = None

    @property
    def url(self) -> str:
        """Where clients reach it, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    async def main_loop(self) -> None:
        self.tell(f"serving by replicas on Ray at {self.url} (Ctrl-C stops)")
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self.drain()
        else:
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Refuse new requests, finish what runs, then stop."""
        self.front.draining = True
        self._deadline = time.monotonic() + self.options.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and (not self.front.running or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def serve(
    base: Path | str,
    adapter_dir: Path | str | None,
    options: ServeOptions,
    replicas: Replicas,
    cluster: Cluster,
    tell: Tell = _tell,
) -> None:
    """Serve until told to stop; replicas end with it. Base and adapters must be where every node sees them.

    Raises CheckpointError for a base that is none, OptionError for a cluster that cannot be used, BitloftError where
    replicas do not start or the port is taken.
    """
    base, place = Path(base).absolute(), None if adapter_dir is None else Path(adapter_dir).absolute()
    base_record(base)
    room = replace(cluster, workers=cluster.workers or replicas.most or replicas.least, threads=replicas.threads)
    with connected(room) as ray:
        from ray import serve as library

        tell(f"starting {replicas.least} replicas of {base.name}")
        try:
            server = FrontServer(Front(deploy(ray, base, place, options, replicas)), options, tell)
            server.run()
        except SystemExit as error:
            raise BitloftError(f"cannot listen on {options.host}:{options.port}; choose another port.") from error
        finally:
            library.shutdown()
