"""An adapter's files as a server reads them: pinned, each once, and the version that they are."""

from hashlib import sha256
from pathlib import Path

from bitloft.adapter_files import PACKED_FILE
from bitloft.adapters import CONFIG_FILE, WEIGHTS_FILE, is_packed, read_adapter
from bitloft.checkpoint import JSON_LIMIT, MANIFEST
from bitloft.errors import AdapterError, CheckpointError
from bitloft.folder import Folder


def identity(folder: Folder, pack_plain: float | None) -> tuple[str, int]:
    """The version of the adapter in ``folder``, and about how many bytes it will take; ``pack_plain`` is the true bits
    that a plain one is packed to, or None.

    A packed one is its manifest, which has the sums of the others. Raises AdapterError or CheckpointError, as the
    readers do, for what is no adapter.
    """
    if is_packed(folder):
        manifest = folder.read(MANIFEST, JSON_LIMIT)
        if manifest is None:
            raise CheckpointError(f"{folder} lacks {MANIFEST}; it is not a whole packed adapter.")
        return _sum(manifest), folder.size(PACKED_FILE) or 0
    weights = folder.read(WEIGHTS_FILE)
    if weights is None:
        read_adapter(folder)  # says what is wrong with it
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}; it is not a PEFT adapter.")
    config = folder.read(CONFIG_FILE)
    sums = "".join(_sum(data) for data in (config, weights) if data is not None)
    if pack_plain is not None:
        return _sum(f"{sums} {pack_plain}".encode()), round(len(weights) * pack_plain / 32)
    return _sum(sums.encode()), len(weights)


def inside(path: Path, directory: Path) -> Path:
    """``path`` without links. Raises AdapterError where it leads out of ``directory``."""
    found = path.resolve()
    if not found.is_relative_to(directory.resolve()):
        raise AdapterError(f"{path.name!r} leads out of the adapter directory; put the adapter itself there.")
    return found


def _sum(data: bytes) -> str:
    return sha256(data).hexdigest()
