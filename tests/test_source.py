"""Sources: folders, GGUF files and hub names; what is refused, and what identifies a model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import bitloft.integrations.source as module
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.source import Held, Source, open_source
from bitloft.quantize import quantize


def test_a_folder_is_identified_by_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    source = open_source(str(tiny_model))
    assert (source.name, source.folder, source.gguf) == (tiny_model.name, str(tiny_model), None)
    shutil.copytree(tiny_model, tmp_path / "same")
    assert open_source(str(tmp_path / "same")).fingerprint() == source.fingerprint()
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "same" / "model.safetensors", metadata={"format": "pt"})
    assert open_source(str(tmp_path / "same")).fingerprint() != source.fingerprint()


def test_a_hub_name_is_downloaded_and_identified_by_its_commit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []
    snapshot = tmp_path / "abc123"
    shutil.copytree(tiny_model, snapshot)

    def download(name: str, **settings: Any) -> Path:
        asked.append((name, settings))
        return snapshot

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: SimpleNamespace(_commit_hash="abc123"))
    monkeypatch.setattr(module, "snapshot_download", download)
    source = open_source("someone/model")
    assert (source.name, source.folder, source.commit) == ("someone/model", str(snapshot), "abc123")
    assert asked[0][0] == "someone/model"
    assert "*.bin" not in asked[0][1]["allow_patterns"]
    assert source.fingerprint() != open_source(str(snapshot)).fingerprint()
    assert source.fingerprint() == Source("someone/model", "elsewhere", commit="abc123").fingerprint()


def test_what_is_no_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for given, words in (
        (str(tmp_path / "notes.txt"), "is a file but not a GGUF one"),
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("someone/no-such-model", "neither a local model nor a reachable hub name"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_source(given)
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"holds weights but no config.json"):
        open_source(str(tmp_path / "bare"))
    (tmp_path / "bare" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold a JSON object"):
        open_source(str(tmp_path / "bare")).config()


def test_a_model_that_others_quantized_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    for read in (Source.tensors, Source.load):
        with pytest.raises(CheckpointError, match="is quantized already; quantize the 16-bit model"):
            read(open_source(str(tmp_path / "m")))


def test_a_tensor_in_memory_reads_like_one_in_a_file() -> None:
    held = Held(torch.arange(6.0).reshape(2, 3))
    assert held.spec == ("F32", (2, 3))
    assert torch.equal(held.read(), next(held.chunks()))


def test_gguf_files_are_not_read_by_several_processes(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="jobs is 2, but a GGUF file is converted whole"):
        quantize(tmp_path / "m.gguf", tmp_path / "out", jobs=2)
