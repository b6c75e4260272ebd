"""Shards: read back exactly, laid out as the safetensors library does, and refused by name where they are damaged."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from bitloft.errors import CheckpointError
from bitloft.shards import DTYPES, INDEX, NAMES, Spec, lay_out, open_shards, reserve, shard_files, write

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


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three shards of one 64-byte tensor each, with an index."""
    written(tmp_path, {name: torch.arange(16.0) for name in "abc"}, 64)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    return tmp_path


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_shards(directory)
    return str(caught.value)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "lacks the shard model-00002-of-00003.safetensors (1 of 3 are missing)" in refusal(sharded)
    (sharded / INDEX).unlink()  # the numbers alone tell it too
    assert "lacks the shard model-00002-of-00003.safetensors" in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, sharded / "model-00002-of-00003.safetensors")
    assert "tensor a is both in model-00001-of-00003.safetensors and in model-00002" in refusal(sharded)


def test_an_index_that_lies_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert "says that model-00001-of-00003.safetensors holds ghost, but it does not" in refusal(sharded)
    text = json.dumps(index).replace('"ghost"', '"a"')
    (sharded / INDEX).write_text(text)
    assert "lists a twice" in refusal(sharded)
    (sharded / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}')
    assert "names the shard '../a.safetensors', which is not a file name" in refusal(sharded)
    (sharded / INDEX).write_text("{}")
    assert "not a readable index" in refusal(sharded)


def test_files_without_an_index_must_be_a_set(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    assert "cannot be told which make up the model" in refusal(tmp_path)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    file = sharded / "model-00003-of-00003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    assert f"{file} is truncated: it has {len(whole) - 4} bytes and c ends at {len(whole)}" in refusal(sharded)


def test_a_file_that_shrinks_while_it_is_read_is_named(sharded: Path) -> None:
    entry = open_shards(sharded)["c"]
    entry.file.write_bytes(entry.file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends in the middle of a tensor; it is truncated"):
        entry.read()
    entry.file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .* No such file"):
        entry.read()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "shape and bytes do not agree"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "shape and bytes do not agree"),
        ({"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}, "has dtype F4, which bitloft cannot read"),
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}, "describes tensor w unreadably"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, "describes tensor w unreadably"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, record: dict[str, object], words: str) -> None:
    text = json.dumps({"w": record}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    assert words in refusal(tmp_path)


def test_what_is_written_must_be_what_was_planned(tmp_path: Path) -> None:
    slots = lay_out(tmp_path, {"w": Spec("F32", (4,))}, 1 << 20)
    reserve(tmp_path, slots)
    with pytest.raises(CheckpointError, match="tensor w has 8 bytes where 16 were planned"):
        write(slots, [("w", [torch.zeros(2)])])
