"""The adapters by name: which version a name means, which versions are in memory, and who holds them.

A name leads to a version, and a version is the sha256 of the adapter's files. A request holds the version that it was
accepted with, so replacing or removing a name can never change an answer that is under way; slots that are reused, as
other servers have them, need proof of that. Two names with the same files share one copy. Which versions are in memory,
under which budget, is ``residency``'s to decide.
"""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bitloft.adapters import Adapter, PackedAdapter, is_packed, read_adapter, read_packed
from bitloft.compress import compress
from bitloft.errors import AdapterError, BitloftError, CheckpointError
from bitloft.folder import Folder, pinned
from bitloft.integrations.mismatch import Gate
from bitloft.integrations.record import BaseRecord
from bitloft.modules.multi import AdapterBank
from bitloft.options import ServeOptions
from bitloft.options.generate import bytes_of
from bitloft.serve.files import identity, inside
from bitloft.serve.requests import RequestError
from bitloft.serve.residency import Residency, Version

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Card:
    """What is known of one model name now. ``key`` is the sha256 of the version (None: the base), ``nbytes`` what it
    takes in memory while it is there, ``note`` tells of a base mismatch that was let through."""

    name: str
    key: str | None
    nbytes: int = 0
    note: str | None = None
    resident: bool = True
    loading: bool = False
    quarantined: bool = False
    refs: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    last_used: float | None = None


@dataclass(frozen=True)
class StoreStats:
    """Numbers of the whole store; ``budget`` None is no limit, times are in seconds."""

    adapters: int
    resident: int
    bytes: int
    budget: int | None
    pinned_bytes: int
    hits: int
    loads: int
    load_failures: int
    load_seconds: float
    evictions: int
    waits: int


@dataclass
class _Entry:
    """A name: its version and its traffic."""

    version: Version
    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    last_used: float | None = None


@dataclass(eq=False)
class Handle:
    """A version that a request keeps in memory until ``release``; the base has none and is always there."""

    name: str
    key: str | None
    version: Version | None = None
    residency: Residency | None = None
    entry: _Entry | None = None
    _held: bool = field(default=True)

    def ready(self) -> bool:
        return self.version is None or self.version.resident

    @property
    def failure(self) -> RequestError | None:
        """Why the version will not come, or must not be computed with any more; or None."""
        if self.version is not None and self.version.quarantined:
            return overflowed(self.name)
        return None if self.version is None else self.version.failure

    def release(self) -> None:
        """Let the version go; a second time nothing happens."""
        if self._held:
            self._held = False
            if self.version is not None and self.residency is not None:
                self.residency.release(self.version)

    def count(self, prompt: int, answer: int) -> None:
        """Traffic of the name."""
        if self.entry is not None:
            self.entry.prompt_tokens += prompt
            self.entry.answer_tokens += answer


def overflowed(name: str) -> RequestError:
    """What is told of a version in quarantine."""
    said = f"the numbers of adapter {name!r} overflowed; it is not served any more."
    return RequestError("adapter_numerical_error", said)


class AdapterStore:
    """Base and adapters by model name. ``refused`` has the reason of every subdirectory that is not served."""

    def __init__(
        self,
        bank: AdapterBank,
        record: BaseRecord,
        base_name: str,
        options: ServeOptions | None = None,
    ) -> None:
        """Of ``options`` count those about adapters: ``base_mismatch``, ``adapter_budget`` and ``pack_plain``."""
        options = options or ServeOptions()
        self.bank, self.record, self.base_name, self.pack_plain = bank, record, base_name, options.pack_plain
        self._gate = Gate(bank, record, options.base_mismatch)
        self.residency = Residency(bytes_of(options.adapter_budget), self._load, bank.detach)
        self.refused: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()
        self._place: tempfile.TemporaryDirectory[str] | None = None

    # ---- looking up --------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are served, in order."""
        return tuple(sorted(self._entries))

    def find(self, name: str | None) -> Card:
        """What ``name`` leads to now; None or the base's name is the base. Raises RequestError (model_not_found)."""
        if name is None or name == self.base_name:
            return Card(self.base_name, None)
        return self._card(name, self._entry(name))

    def cards(self) -> list[Card]:
        """All adapters, by name."""
        with self._lock:
            return [self._card(name, self._entries[name]) for name in self.names]

    def stats(self) -> StoreStats:
        found = self.residency.counts
        return StoreStats(
            len(self._entries), self.residency.resident, self.residency.bytes, self.residency.budget,
            self.residency.pinned, found.hits, found.loads, found.failures, found.seconds, found.evictions, found.waits,
        )  # fmt: skip

    def _card(self, name: str, entry: _Entry) -> Card:
        version = entry.version
        return Card(
            name, version.key, version.nbytes, version.note, version.resident, version.loading, version.quarantined,
            version.refs, entry.requests, entry.prompt_tokens, entry.answer_tokens, entry.last_used,
        )  # fmt: skip

    def _entry(self, name: str) -> _Entry:
        found = self._entries.get(name)
        if found is not None:
            return found
        if name in self.refused:
            raise RequestError(
                "model_not_found", f"the adapter {name!r} was refused; the server's log says why.", "model"
            )
        raise RequestError("model_not_found", f"the model {name[:128]!r} does not exist.", "model")

    # ---- holding -----------------------------------------------------------------------------------------------------

    def acquire(self, name: str | None) -> Handle:
        """Hold the version that ``name`` leads to now; its load begins unless it is there. Never blocks.

        Raises RequestError: model_not_found; adapter_numerical_error for a version in quarantine; adapter_invalid where
        it was tried a moment ago and its files are bad.
        """
        if name is None or name == self.base_name:
            return Handle(self.base_name, None)
        with self._lock:
            entry = self._entry(name)
            version = entry.version
            if version.quarantined:
                raise overflowed(name)
            self.residency.hold(version)
            entry.requests += 1
            entry.last_used = time.time()
        return Handle(name, version.key, version, self.residency, entry)

    @contextmanager
    def holding(self, *names: str | None) -> Iterator[list[str | None]]:
        """The keys of these versions, all in memory for the length of the block; waits for their loads."""
        handles = [self.acquire(name) for name in names]
        try:
            for handle in handles:
                if handle.version is not None:
                    self.residency.wait(handle.version)
            yield [handle.key for handle in handles]
        finally:
            for handle in handles:
                handle.release()

    def quarantine(self, key: str) -> None:
        """Serve this version no more: a computation with it overflowed."""
        self.residency.quarantine(key)

    # ---- changing ----------------------------------------------------------------------------------------------------

    def scan(self, directory: Path) -> None:
        """Take in every subdirectory; one that cannot be served is noted in ``refused`` and does no other harm.

        All are read and checked that the budget has room for; the others when they are first asked for. Raises
        CheckpointError where the directory itself is missing.
        """
        if not directory.is_dir():
            raise CheckpointError(f"the adapter directory {directory} does not exist; make it or name another.")
        for path in sorted(directory.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                try:
                    self.add(path.name, inside(path, directory), replace=True, later=True)
                except (BitloftError, OSError) as error:
                    self.refused[path.name] = str(error)

    def add(self, name: str, path: Path, *, replace: bool = False, later: bool = False) -> Card:
        """Serve the adapter in directory ``path`` as ``name``: read, checked and in memory when this returns (with
        ``later`` only as long as there is room without evicting another). No part of ``path`` is a link, and no file of
        the adapter: a path is checked before it comes here, and must not lead elsewhere since.

        Raises RequestError (invalid_value for the name, adapter_exists, adapter_capacity), AdapterError or
        CheckpointError for files that cannot be served; then nothing has changed.
        """
        self._require_name(name)
        if name in self._entries and not replace:
            raise RequestError("adapter_exists", f"the adapter {name!r} exists already; replace or remove it.", "name")
        with pinned(path) as folder:
            key, size = identity(folder, self.pack_plain)
        version = self.residency.version(key, folder.path, size)
        if version.path != folder.path and not version.resident:
            version.path = folder.path  # the same files, where they are now
        self.residency.name(version, 1)
        try:
            if not (later and self.residency.full_for(version)):
                self._verify(version)
        except BaseException:
            self.residency.name(version, -1)
            raise
        with self._lock:
            old = self._entries.get(name)
            self._entries[name] = _Entry(version)
            if old is not None:
                self._drop(old)
            self.refused.pop(name, None)
            return self._card(name, self._entries[name])

    def _verify(self, version: Version) -> None:
        """Have it in memory once. Raises what is wrong with it."""
        self.residency.hold(version, again=True)
        try:
            self.residency.wait(version)
        finally:
            self.residency.release(version)

    def remove(self, name: str) -> None:
        """Forget a name; requests that hold its version keep it to their end. Raises RequestError (model_not_found)."""
        with self._lock:
            self._drop(self._entry(name))
            del self._entries[name]

    def _drop(self, entry: _Entry) -> None:
        self.residency.name(entry.version, -1)

    def close(self) -> None:
        """End the loading thread."""
        self.residency.close()
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    def on_change(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, from the loading thread, whenever a version has come or will not come."""
        self.residency.listeners.append(call)

    def _require_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise AdapterError(f"{name!r} cannot be a model name; use letters, digits, '.', '_' and '-'.")
        if name == self.base_name:
            raise AdapterError(f"{name!r} is the name of the base; rename the adapter or the base (name).")

    # ---- reading, on the loading thread ------------------------------------------------------------------------------

    def _load(self, version: Version) -> int:
        """Read a version into the bank; returns its bytes. What was summed is what is parsed, never a mapped file."""
        adapter: Adapter | PackedAdapter
        with pinned(version.path) as folder:
            if identity(folder, self.pack_plain)[0] != version.key:
                name = version.path.name
                raise AdapterError(f"adapter {name} has changed on disk; add it again to serve what is there.")
            if is_packed(folder):
                adapter = read_packed(folder)
            else:
                adapter = self._packed(version.key, folder) if self.pack_plain is not None else read_adapter(folder)
        version.note = self._gate.attach(version.key, adapter, version.path.name)
        return self.bank.nbytes(version.key)

    def _packed(self, key: str, folder: Folder) -> PackedAdapter:
        """A plain adapter, packed once: a version that comes back is read as it was packed then."""
        if self._place is None:
            self._place = tempfile.TemporaryDirectory(prefix="bitloft-packed-")
        place = Path(self._place.name) / key
        if not place.exists():
            compress(folder, place, bits=self.pack_plain, refine=False)
        return read_packed(place)
