"""The serve verb on Ray Serve: replicas of the whole server as a deployment, one front that passes requests on.

    client -> front (uvicorn, in this process) -> handle, by adapter (routing.py) -> replica: the ASGI app, the engine

A replica runs the same application as a server on one machine, fed with ASGI messages instead of a socket, so keys,
limits, errors and streams are the same and are written once. The front (``front.py``) reads one field of the body, the
model, and listens; it takes the place of Serve's proxy.
"""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitloft.errors import BitloftError, OptionError
from bitloft.integrations.ray import Cluster, connected
from bitloft.integrations.record import base_record
from bitloft.options import ServeOptions
from bitloft.serve.api import app
from bitloft.serve.front import Front, FrontServer, Message, Tell
from bitloft.serve.http import open_service

APP = "bitloft"
READY_SECONDS = 600.0  # for replicas to load their base
END_SECONDS = 10.0  # for an application to end after its client has gone

log = logging.getLogger("bitloft")


@dataclass(frozen=True)
class Replicas:
    """How many replicas run: ``least`` to ``most`` as requests ask for (``most`` None: always ``least``), each with
    ``threads`` processors. More come when there has been too much for ``up`` seconds, fewer when there has been too
    little for ``down``. Raises OptionError for numbers that cannot be."""

    least: int = 1
    most: int | None = None
    threads: int = 1
    up: float = 30.0
    down: float = 600.0

    def __post_init__(self) -> None:
        if self.least < 1 or self.threads < 1 or (self.most is not None and self.most < self.least):
            raise OptionError(
                f"replicas are {self.least} to {self.most or self.least} with {self.threads} threads; use 1 or more, "
                "and no fewer at most than at least."
            )
        for name, seconds in (("up", self.up), ("down", self.down)):
            if not 0 <= seconds < float("inf"):
                raise OptionError(f"scale-{name} is {seconds:g} seconds; use 0 or more.")


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
                "target_ongoing_requests": options.max_batch, "upscale_delay_s": replicas.up,
                "downscale_delay_s": replicas.down,
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
