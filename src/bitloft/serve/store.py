"""The adapters of one directory by name: read once, kept packed, refused with a reason.

A name leads to a version, and a version is the sha256 of the adapter's files. A request holds the version that it was
accepted with, so replacing a name can never change an answer that is under way; slots that are reused, as other
servers have them, need proof of that. Two names with the same files share one copy.
"""

import re
from dataclasses import dataclass
from hashlib import sha256 as new_sha256
from pathlib import Path

from bitloft.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, PackedAdapter, is_packed, read_adapter, read_packed
from bitloft.checkpoint import sha256
from bitloft.errors import AdapterError, BitloftError, CheckpointError
from bitloft.integrations.loading import BaseRecord
from bitloft.integrations.mismatch import Gate
from bitloft.modules.multi import AdapterBank
from bitloft.serve.requests import RequestError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Handle:
    """One version of one adapter: ``key`` names it in the bank (None is the base); ``note`` tells of a base mismatch
    that was let through."""

    name: str
    key: str | None
    nbytes: int = 0
    note: str | None = None


class AdapterStore:
    """Base and adapters by model name. ``refused`` has the reason of every subdirectory that is not served."""

    def __init__(self, bank: AdapterBank, record: BaseRecord, base_name: str, base_mismatch: str | None = None) -> None:
        self.bank, self.record, self.base_name = bank, record, base_name
        self._gate = Gate(bank, record, base_mismatch)
        self.refused: dict[str, str] = {}
        self._handles: dict[str, Handle] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are served, in order."""
        return tuple(sorted(self._handles))

    def acquire(self, name: str | None) -> Handle:
        """The version that ``name`` leads to now; None or the base's name is the base. Raises RequestError (404)."""
        if name is None or name == self.base_name:
            return Handle(self.base_name, None)
        if name in self._handles:
            return self._handles[name]
        if name in self.refused:
            raise RequestError(
                "model_not_found", f"the adapter {name!r} was refused; the server's log says why.", "model"
            )
        raise RequestError("model_not_found", f"the model {name[:128]!r} does not exist.", "model")

    def scan(self, directory: Path) -> None:
        """Take in every subdirectory; one that cannot be served is noted in ``refused`` and does no other harm.

        Raises CheckpointError where the directory itself is missing.
        """
        if not directory.is_dir():
            raise CheckpointError(f"the adapter directory {directory} does not exist; make it or name another.")
        for path in sorted(directory.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                try:
                    self._handles[path.name] = self._read(path, directory)
                except (BitloftError, OSError) as error:
                    self.refused[path.name] = str(error)

    def _read(self, path: Path, directory: Path) -> Handle:
        if not NAME.fullmatch(path.name):
            raise AdapterError(f"{path.name!r} cannot be a model name; use letters, digits, '.', '_' and '-'.")
        if path.name == self.base_name:
            raise AdapterError(f"{path.name!r} is the name of the base; rename the adapter or the base (name).")
        if not path.resolve().is_relative_to(directory.resolve()):
            raise AdapterError(f"{path.name!r} leads out of the adapter directory; put the adapter itself there.")
        adapter: Adapter | PackedAdapter = read_packed(path) if is_packed(path) else read_adapter(path)
        key = adapter.sha256 if isinstance(adapter, PackedAdapter) else _identity(path)
        note = self._gate.attach(key, adapter, path.name)
        return Handle(path.name, key, self.bank.nbytes(key), note)


def _identity(path: Path) -> str:
    """sha256 over the sums of a plain adapter's two files."""
    sums = "".join(sha256(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    return new_sha256(sums.encode()).hexdigest()
