"""Shards: a model's safetensors files, read one tensor at a time by pread.

A file is 8 bytes of header length, a JSON header (tensor -> dtype, shape, offsets) and the data. Headers and index are
checked against each other and the files' lengths before any data is read, so that a damaged download is found in the
first second and not in the second hour. Nothing is mapped (``checkpoint.py`` says why); the library's own reader maps,
or reads whole files.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from bitloft.checkpoint import JSON_LIMIT, read_header, weight_files
from bitloft.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHUNK = 64 << 20  # bytes that a copy holds at once

# In the order in which the safetensors library sorts data, last one first.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor is before it has values: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its file and the first byte of its data there."""

    file: Path
    begin: int
    spec: Spec

    def read(self) -> Shaped[Tensor, "*shape"]:
        """The tensor, in aligned memory of its own. Raises CheckpointError where the file ends before it."""
        raw = torch.empty(self.spec.nbytes, dtype=torch.uint8)
        _pread(self.file, self.begin, raw)
        return raw.view(DTYPES[self.spec.dtype]).reshape(self.spec.shape)

    def chunks(self) -> Iterator[Shaped[Tensor, " bytes"]]:
        """Its bytes, at most CHUNK at a time."""
        for start in range(0, self.spec.nbytes, CHUNK):
            raw = torch.empty(min(CHUNK, self.spec.nbytes - start), dtype=torch.uint8)
            _pread(self.file, self.begin + start, raw)
            yield raw


def _pread(file: Path, offset: int, into: Tensor) -> None:
    view, done = into.numpy().data, 0
    try:
        handle = os.open(file, os.O_RDONLY)
        try:
            while done < len(view):
                count = os.preadv(handle, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{file} ends in the middle of a tensor; it is truncated.")
                done += count
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}.") from error


def open_shards(directory: Path) -> dict[str, Entry]:
    """Every tensor of a model folder by name; headers are checked, data is not read.

    ``model.safetensors`` if it is there, else the shards of the index, else a complete numbered set. Raises
    CheckpointError for a shard that is missing or truncated, a tensor that two shards hold or the index lists twice,
    one that the index puts into a shard that lacks it, and a dtype that torch does not have.
    """
    weight_map = None if (directory / SINGLE).exists() else _weight_map(directory)
    files = shard_files(directory)
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in _entries(file).items():
            if name in found:
                raise CheckpointError(
                    f"tensor {name} is both in {found[name].file.name} and in {file.name} of {directory}; "
                    "one of the shards belongs to another model."
                )
            found[name] = entry
    for name, shard in (weight_map or {}).items():
        if name not in found or found[name].file.name != shard:
            raise CheckpointError(f"{directory / INDEX} says that {shard} holds {name}, but it does not.")
    return found


def shard_files(directory: Path) -> list[Path]:
    """The weight files that make up the model in a folder. Raises CheckpointError where one is missing."""
    everything = weight_files(directory)
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    weight_map = _weight_map(directory)
    names = sorted(set(weight_map.values())) if weight_map else [file.name for file in everything]
    if not weight_map:
        names = _numbered(directory, names)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks the shard {missing[0]} ({len(missing)} of {len(names)} are missing); fetch it again."
        )
    return [directory / name for name in names]


def _weight_map(directory: Path) -> dict[str, str] | None:
    """The index's tensor -> shard, or None without an index."""
    file = directory / INDEX
    if not file.exists():
        return None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names if len(set(names)) < len(names) else ():
            if names.count(name) > 1:
                raise CheckpointError(f"{file} lists {name} twice; it is damaged.")
        return dict(pairs)

    try:
        if file.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; an index stays under {JSON_LIMIT}.")
        weight_map = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a readable index (no weight_map); it is damaged.") from error
    for shard in shards.values():
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{file} names the shard {shard!r}, which is not a file name.")
    return shards


def _numbered(directory: Path, names: list[str]) -> list[str]:
    """All names of a numbered set (``x-00001-of-00003.safetensors``), or the only file."""
    stem, sep, count = names[0].removesuffix(".safetensors").rpartition("-of-")
    if sep and count.isdecimal() and "-" in stem and int(count) < 100_000:
        base = stem.rpartition("-")[0]
        width = len(stem.rpartition("-")[2])
        return [f"{base}-{i:0{width}}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    if len(names) > 1:
        raise CheckpointError(
            f"{directory} holds {len(names)} weight files and no {INDEX}; it cannot be told which make up the model."
        )
    return names


def _entries(file: Path) -> dict[str, Entry]:
    """Tensors of one file, after checking that shapes, offsets and the file's length agree."""
    header, size = read_header(file), file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + struct.unpack("<Q", stream.read(8))[0]
    found = {}
    for name, record in header.items():
        if name == "__metadata__":
            continue
        try:
            spec = Spec(str(record["dtype"]), tuple(int(n) for n in record["shape"]))
            begin, end = (int(n) for n in record["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} describes tensor {name} unreadably; its header is damaged.") from error
        if spec.dtype not in DTYPES:
            raise CheckpointError(f"tensor {name} of {file} has dtype {spec.dtype}, which bitloft cannot read.")
        if min(spec.shape, default=0) < 0 or begin < 0 or spec.nbytes != end - begin:
            raise CheckpointError(
                f"{file} says that {name} is {spec.dtype} {list(spec.shape)} in {end - begin} bytes; "
                "shape and bytes do not agree."
            )
        if start + end > size:
            raise CheckpointError(f"{file} is truncated: it has {size} bytes and {name} ends at {start + end}.")
        found[name] = Entry(file, start + begin, spec)
    position = start
    for name, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].spec.nbytes)):
        if entry.begin < position:
            raise CheckpointError(f"{file} gives {name} bytes that are another tensor's too; its header is damaged.")
        position = entry.begin + entry.spec.nbytes
    return found
