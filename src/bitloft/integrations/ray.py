"""Ray: the items of a job as tasks on other processes and machines, results as they come.

    spread(cluster, prepare, setup, work, items)  ->  (item, work(prepare(*setup), item)) for every item, in any order

``prepare`` runs once in each worker process, ``work`` once an item; both are named functions of a package that every
node has. A task whose process died is begun again on another one, so a kill costs one item. At most twice as many tasks
as workers are under way: results wait in Ray's object store until they are taken, and a slow taker must not fill it.
Ray brings scheduling, retries and transport; the alternative, multiprocessing, ends at one machine. Items and results
travel as Ray's pickles between processes of one cluster: who can reach a cluster can run code there (docs/scale.md).
"""

import logging
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar
from uuid import uuid4

from bitloft import __version__
from bitloft.errors import BitloftError, OptionError

ANSWER = 5.0  # seconds that an address has to answer
State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")
KEPT = 2  # jobs whose prepared state a worker process keeps


@dataclass(frozen=True)
class Cluster:
    """Where tasks run. Without ``address`` a cluster of ``workers`` processes is started on this machine, and ended.

    ``address`` is auto (a cluster that runs on this machine) or HOST:PORT. ``workers`` tasks run at the same time
    (None: as many as the processors hold), each with ``threads`` threads. ``memory`` is what a task is promised, in
    bytes: a node takes no more tasks than its memory holds. A task whose process died is begun ``attempts`` times.
    ``store`` is the size of an own cluster's object store in bytes. Raises OptionError for values that cannot be.
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    memory: int | None = None
    attempts: int = 3
    store: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "memory", "attempts", "store"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} of the cluster is {value}; use 1 or more.")
        if self.address is not None and self.address != "auto" and _endpoint(self.address) is None:
            raise OptionError(
                f"address {self.address!r} is neither auto nor HOST:PORT; run on a node of the cluster, or submit the "
                "command there as a Ray job."
            )


def _endpoint(address: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"\[?([^\s/\[\]]+)\]?:(\d{1,5})", address)
    return (match[1], int(match[2])) if match and int(match[2]) < 1 << 16 else None


def library() -> Any:
    """The ray module. Raises OptionError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported and by the processes it starts
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise OptionError(
            f"the engine ray needs Ray ({error}); install it with `pip install 'bitloft[ray]'`."
        ) from error
    return ray


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected to the cluster; one that was connected already is used and left as it is.

    An own cluster has no dashboard and reports no usage. Raises OptionError where nothing answers at the address, or
    where no node has the threads or the memory of one task.
    """
    ray = library()
    own = not ray.is_initialized()
    if own:
        _start(ray, cluster)
    try:
        _check_room(ray, cluster)
        yield ray
    finally:
        if own:
            ray.shutdown()


def _start(ray: Any, cluster: Cluster) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    endpoint = _endpoint(cluster.address or "")
    if endpoint is not None:
        try:  # Ray itself waits two minutes and then ends the process
            socket.create_connection(endpoint, ANSWER).close()
        except OSError as error:
            raise OptionError(
                f"nothing answers at {cluster.address} ({error.strerror or error}); `ray start --head` prints the "
                "address of a cluster. What is finished stays: resume when it is there."
            ) from error
    try:
        if cluster.address is None:
            processors = (cluster.workers or max((os.cpu_count() or 1) // cluster.threads, 1)) * cluster.threads
            ray.init(
                address="local", num_cpus=processors, num_gpus=0, include_dashboard=False,
                object_store_memory=cluster.store, _system_config={"task_oom_retries": cluster.attempts}, **quiet,
            )  # fmt: skip
        else:
            ray.init(address=cluster.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        where = f"the Ray cluster at {cluster.address}" if cluster.address else "a Ray cluster on this machine"
        raise OptionError(f"cannot use {where} ({first}); `ray status` tells whether one runs.") from error


def _check_room(ray: Any, cluster: Cluster) -> None:
    """A task that no node can hold would wait for ever."""
    rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, wanted in (("CPU", cluster.threads), ("memory", cluster.memory or 0)):
        most = max((room.get(name, 0) for room in rooms), default=0)
        if most < wanted:
            what = "threads" if name == "CPU" else "bytes of memory"
            raise OptionError(
                f"a task asks for {wanted:,} {what}, and no node of the cluster has more than {most:,.0f}."
            )


def spread(
    cluster: Cluster,
    prepare: Callable[..., State],
    setup: tuple[Any, ...],
    work: Callable[[State, Item], Result],
    items: Sequence[Item],
    *,
    key: str | None = None,
    lost: Callable[[Item, str], Result] | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Every item with what ``work`` gave for it, as they finish. Calls of one ``key`` share what was prepared.

    ``lost`` makes the result of an item whose process died ``attempts`` times; without it that ends the job.

    Raises what ``work`` raised, where that is a BitloftError with the node's name added; BitloftError for a process
    that died ``attempts`` times on one item, for a full object store, for a node without this version of bitloft;
    OptionError as ``connected``. Tasks that are under way then end by themselves or with the connection: cancelling
    one that is about to finish makes Ray 2.60 end the whole process.
    """
    with connected(cluster) as ray:
        task = ray.remote(_task).options(
            num_cpus=cluster.threads,
            memory=cluster.memory,
            max_retries=cluster.attempts - 1,
            scheduling_strategy="SPREAD",
        )
        job = ray.put((key or uuid4().hex, versions(), prepare, setup, work))
        most = max(int(ray.cluster_resources().get("CPU", 1)) // cluster.threads, 1)
        workers = cluster.workers or most
        window = workers if workers < most else 2 * workers  # a task in hand for each, where Ray would not begin it
        waiting: dict[Any, Item] = {}
        queue = iter(items)
        while True:
            while len(waiting) < window and (item := next(queue, _END)) is not _END:
                waiting[task.remote(job, item)] = item  # type: ignore[assignment]
            if not waiting:
                return
            for ready in ray.wait(list(waiting), num_returns=1)[0]:
                item = waiting.pop(ready)
                try:
                    found = _result(ray, cluster, ready, item)
                except _DiedError as error:
                    if lost is None:
                        raise
                    found = lost(item, str(error))
                yield item, found


_END = object()


class _DiedError(BitloftError):
    """The processes that worked on an item died."""


def versions() -> dict[str, str]:
    """What decides the bytes of a result and must be the same in every process."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "bitloft": __version__}
    for package in ("torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _result(ray: Any, cluster: Cluster, ready: Any, item: object) -> Any:
    """One task's result, or what went wrong as one sentence."""
    errors = ray.exceptions
    try:
        return ray.get(ready)
    except errors.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, BitloftError):
            raise cause from None
        if isinstance(cause, ImportError) or "No module named 'bitloft" in str(error):
            raise _without_package(error) from error
        raise
    except (errors.ObjectStoreFullError, errors.OutOfDiskError) as error:
        raise BitloftError(
            f"the object store of Ray is full at {item}; start the cluster with a larger one (--object-store-memory), "
            "or use fewer jobs, and resume."
        ) from error
    except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError) as error:
        raise _DiedError(
            f"the process that worked on {item} died {cluster.attempts} times (out of memory?); give each task more "
            "memory or use fewer jobs, and resume."
        ) from error
    except (errors.RuntimeEnvSetupError, errors.RaySystemError, RuntimeError) as error:
        if "No module named 'bitloft" in str(error) or "ModuleNotFoundError" in str(error):
            raise _without_package(error) from error
        raise


def _without_package(error: BaseException) -> BitloftError:
    found = re.search(r"No module named '([\w.]+)'", str(error))
    lacking = found[1] if found else "a package of bitloft"
    return BitloftError(
        f"a node of the Ray cluster lacks {lacking}; install bitloft {__version__} with its requirements there, and "
        "resume."
    )


_prepared: dict[str, Any] = {}  # of a worker process: its newest jobs' states


def _task(job: tuple[str, dict[str, str], Callable[..., Any], tuple[Any, ...], Callable[..., Any]], item: Any) -> Any:
    """Runs in a worker process."""
    name, wanted, prepare, setup, work = job
    try:
        if name not in _prepared:
            _agree(wanted)
            made = prepare(*setup)
            while len(_prepared) >= KEPT:
                del _prepared[next(iter(_prepared))]
            _prepared[name] = made
        return work(_prepared[name], item)
    except BitloftError as error:
        raise type(error)(f"{error} (on node {platform.node()})") from None


def _agree(wanted: dict[str, str]) -> None:
    """Raise BitloftError where this process has other versions than the one that asks."""
    found = versions()
    for name, text in wanted.items():
        if found[name] != text:
            raise BitloftError(
                f"the job was begun with {name} {text}, and this node has {found[name]}; install the same there."
            )
