"""Slots: files laid out as the safetensors library does, before their tensors exist."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from bitloft.errors import CheckpointError
from bitloft.shards import DTYPES, INDEX, NAMES, Spec, open_shards, shard_files
from bitloft.slots import lay_out, reserve, write

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=8
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def made(names: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    values = {}
    for number, (name, (dtype, shape)) in enumerate(names.items()):
        count = torch.Size(shape).numel()
        values[name] = (torch.arange(count) + number).to(DTYPES[dtype]).reshape(shape)
    return values


def written(directory: Path, tensors: dict[str, torch.Tensor], limit: int) -> None:
    slots = lay_out(directory, {k: Spec(NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}, limit)
    reserve(directory, slots)
    write(slots, ((name, [tensors[name]]) for name in reversed(tensors)))
    if slots.index is not None:
        (directory / INDEX).write_text(json.dumps(slots.index))


@given(names=TENSORS)
def test_a_single_file_has_the_bytes_of_the_library(
    names: dict[str, tuple[str, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    names.pop("__metadata__", None)
    tensors, directory = made(names), tmp_path_factory.mktemp("one")
    written(directory, tensors, 1 << 40)
    assert (directory / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})
    found = open_shards(directory)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = found[name].read()
        assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor))
        assert b"".join(bits(piece) for piece in found[name].chunks()) == bits(tensor)


@given(names=TENSORS, limit=st.integers(1, 200))
def test_shards_keep_the_limit_and_hold_everything_once(
    names: dict[str, tuple[str, tuple[int, ...]]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names.pop("__metadata__", None)
    tensors, directory = made(names), tmp_path_factory.mktemp("many")
    written(directory, tensors, limit)
    files = shard_files(directory)
    loaded = [load_file(file) for file in files]
    assert sum(len(part) for part in loaded) == len(tensors)
    for part in loaded:
        assert len(part) <= 1 or sum(t.nbytes for t in part.values()) <= limit
        assert all(bits(part[name]) == bits(tensors[name]) for name in part)
    assert open_shards(directory).keys() == tensors.keys()


def test_what_is_written_must_be_what_was_planned(tmp_path: Path) -> None:
    slots = lay_out(tmp_path, {"w": Spec("F32", (4,))}, 1 << 20)
    reserve(tmp_path, slots)
    with pytest.raises(CheckpointError, match="tensor w has 8 bytes where 16 were planned"):
        write(slots, [("w", [torch.zeros(2)])])


def test_space_is_taken_at_once_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = lay_out(tmp_path, {"w": Spec("F32", (1 << 20,))}, 1 << 30)

    def fails(number: int) -> None:
        def claim(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", claim)

    fails(errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        reserve(tmp_path, slots)
    fails(errno.EOPNOTSUPP)
    reserve(tmp_path, slots)
    assert (tmp_path / "model.safetensors").stat().st_size == slots.nbytes
