"""A finished directory put into object storage, so that it is whole there or not there at all.

    URL/every file, each checked for its length      URL/manifest.json last

Storage has no rename of directories, but an object appears only when its upload is complete (S3, GCS, Azure), and the
manifest lists every other file with its sum: where there is no manifest there is no base. What has arrived is written
down (``journal``), so that an upload that broke off goes on with what is missing.
"""

import uuid
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from bitloft.checkpoint import MANIFEST, sha256
from bitloft.errors import CheckpointError
from bitloft.integrations.remote import storage_of, telling
from bitloft.journal import Journal


def staged(url: str, stage: Path | str | None) -> Path:
    """Where the directory of ``url`` is made before it goes there: in ``stage``, or the current directory.

    Raises CheckpointError for a URL that names nothing below its storage.
    """
    name = url.rstrip("/").rpartition("/")[2]
    if not name or url.rstrip("/").count("/") < 3:
        raise CheckpointError(f"{url} names no directory; give one below it, such as {url.rstrip('/')}/base.")
    return Path(stage or ".") / f"{name}.upload"


def check_place(url: str, *, overwrite: bool, resume: bool) -> None:
    """Raise CheckpointError where something is in the way at ``url``, or nothing can be written there."""
    with telling(url, "write"):
        storage, root = storage_of(url)
        names = _names(storage, root)
    if MANIFEST in names and not overwrite:
        raise CheckpointError(f"{url} exists already; remove it or choose another place.")
    if names and not (overwrite or resume):
        raise CheckpointError(
            f"{url} holds files and no {MANIFEST}, as a broken upload leaves it; resume, or choose another place."
        )
    with telling(url, "write"):
        if isinstance(storage, LocalFileSystem):
            storage.makedirs(root, exist_ok=True)
        probe = f"{root}/.bitloft-{uuid.uuid4().hex}"
        storage.pipe_file(probe, b"written to see whether it can be")
        storage.rm_file(probe)


def upload(directory: Path, url: str, journal: Journal, *, overwrite: bool = False) -> None:
    """Put every file of ``directory`` under ``url``, its manifest last; with ``overwrite`` remove what else is there.

    Raises CheckpointError where something else is there and is to stay, where storage refuses, or holds another length
    than was sent; what has arrived by then is in the journal and not sent again.
    """
    with telling(url, "write"):
        storage, root = storage_of(url)
        there = _names(storage, root)
        files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
        others = sorted(there.keys() - files.keys())
        if others and not overwrite:
            raise CheckpointError(f"{url} holds {others[0]}, which is not of this base; choose another place.")
        if MANIFEST in there:  # no longer whole from here on
            storage.rm_file(f"{root}/{MANIFEST}")
        for name, file in files.items():
            if name != MANIFEST:
                _send(storage, file, f"{root}/{name}", journal, name, there.get(name))
        for name in others:
            storage.rm_file(f"{root}/{name}")
        found = _names(storage, root)
        for name, file in files.items():
            size = file.stat().st_size
            if name != MANIFEST and found.get(name) != size:
                raise CheckpointError(f"{url}/{name} has {found.get(name)} bytes, and {size} were sent; resume.")
        storage.put_file(str(files[MANIFEST]), f"{root}/{MANIFEST}")


def _send(storage: Any, file: Path, path: str, journal: Journal, name: str, size: int | None) -> None:
    """One file, unless it arrived before, as it is now."""
    digest = sha256(file)
    key, record = f"upload of {name}", {"sha256": digest}
    if size == file.stat().st_size and journal.done.get(key) == record:
        return
    storage.put_file(str(file), path)
    journal.add(key, record)


def _names(storage: Any, root: str) -> dict[str, int]:
    """Files below ``root`` and their lengths."""
    storage.invalidate_cache()
    try:
        found = storage.find(root, detail=True)
    except FileNotFoundError:
        return {}
    prefix = root.strip("/") + "/"
    return {name.strip("/").removeprefix(prefix): int(record["size"]) for name, record in found.items()}
