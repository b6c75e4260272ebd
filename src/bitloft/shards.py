"""Shards: safetensors read one tensor at a time by pread, and written at offsets known before any value is.

A file is 8 bytes of header length, a JSON header (tensor -> dtype, shape, offsets; padded to 8 bytes) and the data,
ordered by dtype width and name, exactly as the safetensors library writes it: a single output shard has the bytes that
``save_file`` of the same tensors would have. Because every offset follows from names, dtypes and shapes, a finished
matrix is written straight to its place and an interrupted run goes on where it stopped; the alternative, one result
file per matrix that are joined at the end, needs the disk twice. Nothing is mapped (``checkpoint.py`` says why).
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
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

# In the order in which the safetensors library sorts data: widest last here, first in the file.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {name: rank for rank, name in enumerate(DTYPES)}


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
    return found


@dataclass(frozen=True)
class Slots:
    """Where every tensor goes: file -> header bytes and total size; tensor -> place; the index of a sharded model."""

    files: dict[str, tuple[bytes, int]]
    places: dict[str, Entry]
    index: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files.values())


def lay_out(directory: Path, tensors: Mapping[str, Spec], limit: int) -> Slots:
    """Distribute tensors, in the given order, over shards of at most ``limit`` bytes (a larger tensor gets its own)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if groups[-1] and filled + spec.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    count = len(groups)
    stems = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files: dict[str, tuple[bytes, int]] = {}
    places: dict[str, Entry] = {}
    for stem, names in zip(stems, groups, strict=True):
        header, offsets, size = _header({name: tensors[name] for name in names})
        files[stem] = (header, size)
        places |= {name: Entry(directory / stem, begin, tensors[name]) for name, begin in offsets.items()}
    index = None
    if count > 1:
        weight_map = {name: place.file.name for name, place in places.items()}
        total = sum(spec.nbytes for spec in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return Slots(files, places, index)


def _header(tensors: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    """Header with its length in front, absolute offset of each tensor, size of the whole file."""
    ordered = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name.encode()))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name in ordered:
        dtype, shape = tensors[name]
        offsets[name] = position
        end = position + tensors[name].nbytes
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {k: start + v for k, v in offsets.items()}, start + position


def reserve(directory: Path, slots: Slots) -> None:
    """Make every shard with its header and its full size, so that a disk too small is found out at once (OSError)."""
    for name, (header, size) in slots.files.items():
        handle = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            os.truncate(handle, size)
            _pwrite(handle, 0, header)
            os.fsync(handle)
        finally:
            os.close(handle)


def write(slots: Slots, tensors: Iterable[tuple[str, Iterable[Tensor]]]) -> None:
    """Write tensors, each given as consecutive pieces of any dtype, to their places; back only when they are on disk.

    Raises OSError where the disk is full.
    """
    handles: dict[Path, int] = {}
    try:
        for name, pieces in tensors:
            place = slots.places[name]
            if place.file not in handles:
                handles[place.file] = os.open(place.file, os.O_WRONLY)
            position = place.begin
            for piece in pieces:
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
                _pwrite(handles[place.file], position, data)
                position += len(data)
            if position != place.begin + place.spec.nbytes:
                raise CheckpointError(
                    f"tensor {name} has {position - place.begin} bytes where {place.spec.nbytes} were planned."
                )
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)


def _pwrite(handle: int, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
