"""A model folder in object storage, by its URL: small files are fetched, weights are read tensor by tensor.

    s3://bucket/model/{config.json, tokenizer..., model-00001-of-00002.safetensors, ...}
      ->  folder of this machine: the small files whole; of each weight file its header and its length (a sparse file)

All checks of ``shards.py`` run on that folder as on any other, before a value is read; what a step needs is then one
ranged read a tensor (fsspec, so s3://, gs://, az://, http:// ... as far as their packages are installed). The
alternative, fetching the model first, takes every node's disk and time for weights that other nodes work on.
"""

import atexit
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from bitloft.checkpoint import HEADER_LIMIT, JSON_LIMIT, PICKLES
from bitloft.errors import CheckpointError
from bitloft.shards import CHUNK, DTYPES, Entry, open_shards, shard_files


def is_url(model: str) -> bool:
    """True for what fsspec reads: ``scheme://...``."""
    return "://" in model


@contextmanager
def telling(url: str, verb: str = "read") -> Iterator[None]:
    """Whatever storage raises becomes one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except ImportError as error:
        raise CheckpointError(f"cannot {verb} {url}: {error}.") from error
    except Exception as error:  # every storage has errors of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot {verb} {url}: {first}; check the address and the access to it.") from error


def storage_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of ``url`` and the path there."""
    import fsspec

    return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RemoteEntry(Entry):
    """A stored tensor whose ``file`` here is only a header; its data is at ``url``."""

    url: str = ""

    def read(self) -> Shaped[Tensor, "*shape"]:
        """The tensor by one ranged read. Raises CheckpointError where storage gives less or nothing."""
        raw = self._range(self.begin, self.spec.nbytes)
        return raw.view(DTYPES[self.spec.dtype]).reshape(self.spec.shape)

    def chunks(self) -> Iterator[Shaped[Tensor, " bytes"]]:
        for start in range(0, self.spec.nbytes, CHUNK):
            yield self._range(self.begin + start, min(CHUNK, self.spec.nbytes - start))

    def _range(self, begin: int, count: int) -> Shaped[Tensor, " bytes"]:
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        with telling(self.url):
            storage, path = storage_of(self.url)
            data = storage.cat_file(path, start=begin, end=begin + count)
            if len(data) != count:
                raise CheckpointError(
                    f"{self.url} gave {len(data)} bytes of {count} at {begin}; it was cut or changed."
                )
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def remote_entries(folder: Path, url: str) -> dict[str, Entry]:
    """Every tensor of the model at ``url``; ``folder`` is what ``fetch_small`` made of it."""
    found: dict[str, Entry] = {}
    for name, entry in open_shards(folder).items():
        found[name] = RemoteEntry(entry.file, entry.begin, entry.spec, f"{url.rstrip('/')}/{entry.file.name}")
    return found


def remote_fingerprint(folder: Path, url: str) -> str:
    """``checkpoint.fingerprint`` of the weight files at ``url``, streamed once."""
    lines = []
    for file in sorted(shard_files(folder)):
        digest, source = hashlib.sha256(), f"{url.rstrip('/')}/{file.name}"
        with telling(source):
            storage, path = storage_of(source)
            with storage.open(path, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        lines.append(f"{file.name} {digest.hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fetch_small(url: str) -> Path:
    """A folder of this machine for the model at ``url``, removed when the process ends; see the module's head.

    Raises CheckpointError where nothing is there, or what is there is no model folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="bitloft-remote-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with telling(url):
        storage, root = storage_of(url)
        for record in storage.ls(root.rstrip("/"), detail=True):
            name, size = record["name"].rstrip("/").rpartition("/")[2], record.get("size") or 0
            if record["type"] != "file" or name.startswith("."):
                continue
            if name.endswith(".safetensors"):
                _stub(storage, record["name"], folder / name, size)
            elif not name.endswith(PICKLES) and size <= JSON_LIMIT:
                (folder / name).write_bytes(storage.cat_file(record["name"]))
    return folder


def _stub(storage: Any, path: str, file: Path, size: int) -> None:
    """The header of a safetensors file in a sparse file of the same length."""
    length = struct.unpack("<Q", storage.cat_file(path, start=0, end=8).ljust(8, b"\0"))[0]
    if length > HEADER_LIMIT:
        raise CheckpointError(f"{path} claims a header of {length} bytes; it is damaged or not safetensors.")
    file.write_bytes(storage.cat_file(path, start=0, end=8 + length))
    os.truncate(file, size)


def fetch_whole(folder: Path, url: str) -> None:
    """Put the whole weight files into ``folder``: for what needs the model in one piece."""
    for file in shard_files(folder):
        source = f"{url.rstrip('/')}/{file.name}"
        with telling(source):
            storage, path = storage_of(source)
            storage.get_file(path, str(file))
