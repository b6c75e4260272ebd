"""Damaged packed adapters: any flipped bit, any truncation, any swap of files between bundles is refused."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from tests.helpers import make_adapter

from bitloft.adapters import read_packed
from bitloft.compress import compress
from bitloft.errors import CheckpointError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    make_adapter(root / "plain", rank=8)
    compress(root / "plain", root / "packed", bits=2.0)
    compress(root / "plain", root / "other", bits=3.0)
    return root


def test_every_byte_and_a_thousand_bits(bundle: Path, tmp_path: Path) -> None:
    """One bit in each byte of the small files, 1,000 random bits of the large one."""
    shutil.copytree(bundle / "packed", tmp_path / "p")
    generator = random.Random(0)
    for file in sorted((tmp_path / "p").iterdir()):
        good = file.read_bytes()
        places = range(len(good)) if len(good) < 1200 else generator.sample(range(len(good)), 1000)
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << generator.randrange(8)
            file.write_bytes(bad)
            with pytest.raises(CheckpointError):
                read_packed(tmp_path / "p")
        file.write_bytes(good)
    assert torch.equal(read_packed(tmp_path / "p").payload, read_packed(bundle / "packed").payload)


def test_every_truncation(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "packed", tmp_path / "p")
    for file in sorted((tmp_path / "p").iterdir()):
        good = file.read_bytes()
        for length in sorted({0, 1, 7, 8, 9, len(good) // 2, len(good) - 1}):
            file.write_bytes(good[:length])
            with pytest.raises(CheckpointError):
                read_packed(tmp_path / "p")
        file.write_bytes(good + b"\0")
        with pytest.raises(CheckpointError):
            read_packed(tmp_path / "p")
        file.write_bytes(good)


@pytest.mark.parametrize("name", ["adapter_model.bitloft.safetensors", "manifest.json"])
def test_files_of_two_bundles_do_not_mix(bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(bundle / "packed", tmp_path / "p")
    shutil.copy(bundle / "other" / name, tmp_path / "p" / name)
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        read_packed(tmp_path / "p")


def test_a_directory_in_place_of_a_file(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "packed", tmp_path / "p")
    (tmp_path / "p" / "adapter_config.json").unlink()
    (tmp_path / "p" / "adapter_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"lacks adapter_config.json"):
        read_packed(tmp_path / "p")
