"""Shards: read back exactly, laid out as the safetensors library does, and refused by name where they are damaged."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitloft.errors import CheckpointError
from bitloft.shards import INDEX, NAMES, Spec, open_shards
from bitloft.slots import lay_out, reserve, write


def written(directory: Path, tensors: dict[str, torch.Tensor], limit: int) -> None:
    slots = lay_out(directory, {k: Spec(NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}, limit)
    reserve(directory, slots)
    write(slots, ((name, [tensors[name]]) for name in reversed(tensors)))
    if slots.index is not None:
        (directory / INDEX).write_text(json.dumps(slots.index))


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


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    record = {"dtype": "F32", "shape": [2]}
    text = json.dumps({"a": record | {"data_offsets": [0, 8]}, "b": record | {"data_offsets": [4, 12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    assert "gives b bytes that are another tensor's too" in refusal(tmp_path)
