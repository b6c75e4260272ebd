"""integrations/remote.py: a model by its URL gives the bytes of the same model in a folder; damage is found."""

from pathlib import Path

import fsspec
import pytest
import torch

from bitloft.errors import CheckpointError
from bitloft.integrations.remote import RemoteEntry, fetch_small, is_url
from bitloft.integrations.source import open_source
from bitloft.quantize import quantize
from bitloft.shards import Spec
from tests.test_fanout import contents


@pytest.fixture
def stored(tiny_model: Path) -> str:
    """The tiny model in fsspec's storage in memory, beside a file that nobody should open."""
    storage = fsspec.filesystem("memory")
    place = f"/bucket/{tiny_model.name}"
    storage.makedirs(place, exist_ok=True)
    for file in tiny_model.iterdir():
        storage.pipe_file(f"{place}/{file.name}", file.read_bytes())
    storage.pipe_file(f"{place}/pytorch_model.bin", b"never opened")
    return f"memory:/{place}"


def test_the_bytes_are_those_of_the_folder(tiny_model: Path, stored: str, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "folder" / "base", format="lm2:64", rank=4)
    quantize(stored, tmp_path / "url" / "base", format="lm2:64", rank=4)
    assert contents(tmp_path / "folder" / "base") == contents(tmp_path / "url" / "base")
    file = f"file://{tiny_model}"
    quantize(file, tmp_path / "file" / "base", format="lm2:64", rank=4)
    assert contents(tmp_path / "folder" / "base") == contents(tmp_path / "file" / "base")


def test_only_headers_are_fetched_until_a_value_is_read(tiny_model: Path, stored: str) -> None:
    source, local = open_source(stored), open_source(str(tiny_model))
    weights = Path(source.folder) / "model.safetensors"
    assert weights.stat().st_size == (tiny_model / "model.safetensors").stat().st_size
    assert not (Path(source.folder) / "pytorch_model.bin").exists()
    assert source.fingerprint() == local.fingerprint()
    ours, theirs = source.tensors(), local.tensors()
    assert ours.keys() == theirs.keys()
    for name, entry in ours.items():
        assert isinstance(entry, RemoteEntry)
        assert torch.equal(entry.read(), theirs[name].read())
        assert torch.equal(torch.cat(list(entry.chunks())), torch.cat(list(theirs[name].chunks())))
    loaded = source.load().state_dict()  # a reader of whole files gets whole files
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in local.load().state_dict().items())


def test_what_cannot_be_read_is_one_sentence(stored: str, tmp_path: Path) -> None:
    for url, sentence in (
        ("memory://bucket/nothing", r"cannot read memory://bucket/nothing: .*check the address"),
        ("nosuch://bucket/model", r"Protocol not known: nosuch"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            fetch_small(url)
    storage = fsspec.filesystem("memory")
    root = stored.removeprefix("memory:/")
    data = storage.cat_file(f"{root}/model.safetensors")
    storage.pipe_file(f"{root}/model.safetensors", data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        open_source(stored).tensors()
    storage.pipe_file(f"{root}/model.safetensors", b"\xff" * 16)
    with pytest.raises(CheckpointError, match="claims a header of"):
        open_source(stored)
    entry = RemoteEntry(tmp_path, 4, Spec("F32", (100,)), f"{stored}/config.json.gone")
    with pytest.raises(CheckpointError, match="cannot read"):
        entry.read()
    storage.pipe_file(f"{root}/short", b"0123456789")
    with pytest.raises(CheckpointError, match="gave 6 bytes of 400 at 4"):
        RemoteEntry(tmp_path, 4, Spec("F32", (100,)), f"{stored}/short").read()


def test_urls() -> None:
    assert is_url("s3://bucket/model")
    assert not is_url("org/model")
    assert not is_url("/a/folder")
