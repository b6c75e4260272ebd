"""Slots: safetensors written at offsets known before any value is.

Offsets follow from names, dtypes and shapes alone: the header is JSON padded to 8 bytes, the data lies in the order of
dtype width and name, exactly as the safetensors library writes it, so a single output file has the bytes that its
``save_file`` would give. A finished matrix goes straight to its place, and an interrupted run goes on where it stopped;
the alternative, one result file per matrix that are joined at the end, needs the disk twice.
"""

import errno
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitloft.errors import CheckpointError, OptionError
from bitloft.shards import DTYPES, SINGLE, Entry, Spec

_ORDER = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class Slots:
    """Where every tensor goes: file -> header bytes and total size; tensor -> place; the index of a sharded model."""

    files: dict[str, tuple[bytes, int]]
    places: dict[str, Entry]
    index: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files.values())


def bytes_of(size: str, name: str) -> int:
    """``5GB``, ``200MB`` or ``64kB`` as a number of bytes, in powers of 1,000. Raises OptionError, naming ``name``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kb|mb|gb|b)", size.strip().lower())
    count = int(float(match[1]) * {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}[match[2]]) if match else 0
    if count < 1:
        raise OptionError(f"{name} is {size!r}; use a size such as 5GB or 200MB.")
    return count


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
            _claim(handle, size)
            os.truncate(handle, size)
            _pwrite(handle, 0, header)
            os.fsync(handle)
        finally:
            os.close(handle)


def _claim(handle: int, size: int) -> None:
    """Take the disk space of a file, where the system and its file system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


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
