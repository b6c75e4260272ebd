"""Files that are whole or absent: writing beside and renaming, damage found by sums, pickles never opened."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitloft.checkpoint import (
    copy_companions,
    fingerprint,
    ignored_pickles,
    read_header,
    read_json,
    read_manifest,
    read_tensors,
    replace_tensors,
    sweep,
    weight_files,
    write_json,
    write_manifest,
    write_tensors,
    writing,
)
from bitloft.errors import CheckpointError


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_directory_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as directory:
        (directory / "a").write_text("x")
        assert names(tmp_path) != ["out"]
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o644


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "a").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out") as directory:
        fail(directory)
    assert names(tmp_path) == []


def test_an_existing_directory_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(CheckpointError, match="exists already"), writing(tmp_path / "out"):
        pass
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert names(tmp_path / "out") == ["old"]
    with writing(tmp_path / "out", overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_killed_run_leaves_no_directory_and_the_next_one_sweeps(tmp_path: Path) -> None:
    code = (
        "import os, sys; from bitloft.checkpoint import writing\n"
        "with writing(sys.argv[1]) as d:\n    (d / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 1
    with writing(tmp_path / "out") as directory:
        (directory / "a").write_text("x")
    assert names(tmp_path) == ["out"]


def test_sweeping_spares_a_run_that_is_alive(tmp_path: Path) -> None:
    alive = tmp_path / f".out.tmp-{os.getpid()}-00000000"
    alive.mkdir()
    sweep(tmp_path / "out")
    assert alive.exists()


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No space left on device; nothing was left"), writing(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_tensors_are_read_into_memory_of_their_own(tmp_path: Path) -> None:
    """Truncating the file after reading neither changes nor kills (a mapped file would)."""
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"a": torch.arange(100_000, dtype=torch.float32)}, {"format": "pt"})
    loaded = read_tensors(file)["a"]
    file.write_bytes(b"")
    assert loaded.sum().item() == torch.arange(100_000, dtype=torch.float32).sum().item()


@pytest.mark.parametrize("cut", [0, 4, 20, 200])
def test_truncated_files_are_refused(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"a": torch.ones(100)})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensors(file)


def test_a_header_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="claims a header"):
        read_header(file)


def test_weights_are_found_or_their_absence_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        weight_files(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_files(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"only as a pickle \(pytorch_model.bin\)"):
        weight_files(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]
    assert ignored_pickles(tmp_path) == ["pytorch_model.bin", "training_args.bin"]


def test_json_that_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(tmp_path / "deep.json")


def bundle(directory: Path) -> Path:
    directory.mkdir()
    (directory / "a.bin8").write_bytes(bytes(range(64)))
    write_json(directory / "b.json", {"x": 1})
    write_manifest(directory, "base", {"fingerprint": "f"})
    return directory


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    directory = bundle(tmp_path / "b")
    assert read_manifest(directory, "base")["fingerprint"] == "f"
    good = (directory / "a.bin8").read_bytes()
    for position in range(0, 64 * 8, 37):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << (position % 8)
        (directory / "a.bin8").write_bytes(bytes(bad))
        with pytest.raises(CheckpointError, match=r"a\.bin8 differs from its manifest"):
            read_manifest(directory, "base")


def test_manifests_of_another_kind_schema_or_place_are_refused(tmp_path: Path) -> None:
    directory = bundle(tmp_path / "b")
    with pytest.raises(CheckpointError, match="does not describe a bundle of kind 'adapter'"):
        read_manifest(directory, "adapter")
    manifest = json.loads((directory / "manifest.json").read_text())
    write_json(directory / "manifest.json", manifest | {"schema": 99})
    with pytest.raises(CheckpointError, match="schema 99"):
        read_manifest(directory, "base")
    write_json(directory / "manifest.json", manifest | {"files": {"../x": {"bytes": 1, "sha256": ""}}})
    with pytest.raises(CheckpointError, match="lacks"):
        read_manifest(directory, "base")


def test_a_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1")
    b.write_bytes(b"2")
    first = fingerprint([a, b])
    assert first == fingerprint([b, a])
    b.write_bytes(b"3")
    assert first != fingerprint([a, b])


def test_companions_are_what_a_model_needs_beside_its_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    wanted = ("tokenizer.json", "chat_template.jinja", "vocab.txt", "generation_config.json")
    others = ("model.safetensors", "model.safetensors.index.json", "config.json", "manifest.json", "README.md",
              "bitloft_report.json", "training_args.bin", ".hidden")  # fmt: skip
    for name in (*wanted, *others):
        (source / name).write_text("source", encoding="utf-8")
    (source / "folder").mkdir()
    (target / "generation_config.json").write_text("target", encoding="utf-8")
    copy_companions(source, target)
    assert {file.name for file in target.iterdir()} == set(wanted)
    assert (target / "generation_config.json").read_text(encoding="utf-8") == "target"


def test_replaced_tensors_are_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.safetensors"
    replace_tensors(file, {"a": torch.zeros(3)})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replace_tensors(file, {"a": torch.ones(3)})
    assert torch.equal(read_tensors(file)["a"], torch.zeros(3))
    replace_tensors(file, {"a": torch.ones(3)}, {"held": "all"})
    assert torch.equal(read_tensors(file)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
