"""The stream: the same bytes whatever the number of processes and interruptions, from every kind of checkpoint."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitloft.journal
import bitloft.stream
from bitloft.checkpoint import publish
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.loading import load
from bitloft.integrations.transformers import BitloftConfig
from bitloft.journal import Journal
from bitloft.modules.linear import quant_linears
from bitloft.options import QuantizeOptions
from bitloft.quantize import TIMES, quantize
from bitloft.slots import write
from tests.helpers import tiny_llama

SETTINGS: dict[str, Any] = {"format": "lm2:64", "rank": 2, "steps": 1}
verb = sys.modules["bitloft.quantize"]  # bitloft.quantize is the function


def digests(directory: Path) -> dict[str, str]:
    """Every file's sha256; only the times may differ between two runs."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.name != TIMES}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(tiny_model, out, **SETTINGS)
    return digests(out)


def in_a_child(run: Callable[[], object]) -> int:
    """Call ``run`` in a forked process; the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] & 127


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), 9)


def die_at(count: int) -> Callable[[int, int, str], None]:
    return lambda done, total, name: die() if done == count else None


def half_a_line(journal: Journal, name: str, record: Any) -> None:
    if len(journal.done) == 3:
        os.write(journal._handle, b'{"step": "model.la')
        die()
    add(journal, name, record)


def half_a_matrix(slots: Any, tensors: Iterator[Any]) -> None:
    write(slots, [next(iter(tensors))])
    die()


def publish_and_die(directory: Path, out: Path) -> None:
    publish(directory, out)
    die()


add = Journal.add
POINTS: dict[str, Any] = {
    "first matrix": (None, None, die_at(1)),
    "last matrix": (None, None, die_at(14)),
    "half a line of the journal": (Journal, "add", half_a_line),
    "half a matrix": (bitloft.stream, "write", half_a_matrix),
    "config": (verb, "_save_settings", die),
    "card": (verb.card, "of_base", die),
    "manifest": (verb, "write_manifest", die),
    "rename": (bitloft.journal, "publish", die),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_no_trace_in_the_bytes(
    tiny_model: Path, tmp_path: Path, whole: dict[str, str], point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, what = POINTS[point]
    with monkeypatch.context() as patch:
        if where is not None:
            patch.setattr(where, name, what)
        progress = what if where is None else None
        settings = SETTINGS | {"progress": progress}
        assert in_a_child(lambda: quantize(tiny_model, tmp_path / "out", **settings)) == 9
    assert not (tmp_path / "out").exists()
    report = quantize(tiny_model, tmp_path / "out", resume=True, **SETTINGS)
    assert digests(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert report.resumed == {"first matrix": 1, "half a line of the journal": 3, "half a matrix": 0}.get(point, 14)


def test_a_kill_after_the_rename_is_a_finished_run(
    tiny_model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bitloft.journal, "publish", publish_and_die)
        assert in_a_child(lambda: quantize(tiny_model, tmp_path / "out", **SETTINGS)) == 9
    assert digests(tmp_path / "out") == whole


def test_jobs_do_not_change_the_bytes_even_when_killed(tiny_model: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    code = (
        "import os, sys, json; from bitloft.quantize import quantize\n"
        "def kill(done, total, name):\n    if done == 6: os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        "    quantize(sys.argv[1], sys.argv[2], jobs=2, progress=kill, **json.loads(sys.argv[3]))"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tiny_model), str(tmp_path / "out"), json.dumps(SETTINGS)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    seen: list[tuple[int, int, str]] = []
    report = quantize(tiny_model, tmp_path / "out", resume=True, jobs=2, progress=lambda *a: seen.append(a), **SETTINGS)
    assert report.resumed == 6
    assert [done for done, _, _ in seen] == list(range(7, 15))
    assert digests(tmp_path / "out") == whole


def test_progress_tells_the_share_of_the_weights_and_the_time_left(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    quantize(tiny_model, tmp_path / "out", progress=lambda *a: seen.append(a), **SETTINGS)
    assert seen[0][2].startswith("model.layers.0.self_attn.q_proj, ")
    assert seen[-1][:2] == (14, 14)
    assert seen[-1][2].endswith(", 100% of the weights, 0 s left")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_keeps_finished_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot reserve space beforehand, the disk fills in the middle of the shard."""
    model = tiny_llama(tmp_path / "m", hidden=128, layers=4)
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this sandbox cannot mount")
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "posix_fallocate")
            with pytest.raises(CheckpointError, match="No space left on device; what is finished stays in"):
                quantize(model, small / "out", **SETTINGS)
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        report = quantize(model, small / "out", resume=True, **SETTINGS)
        assert report.resumed > 0
        quantize(model, tmp_path / "out", **SETTINGS)
        assert digests(small / "out") == digests(tmp_path / "out")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_shards_have_an_index_and_the_same_tensors(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "one", **SETTINGS)
    quantize(tiny_model, tmp_path / "many", shard_size="20kB", **SETTINGS)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_sharded_sources_give_what_single_ones_give(tiny_model: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "m", max_shard_size="40kB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    quantize(tmp_path / "m", tmp_path / "out", **SETTINGS)
    assert digests(tmp_path / "out")["model.safetensors"] == whole["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_not_packed_keeps_its_dtype_and_bytes(tiny_model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "out", **SETTINGS)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "out"))
    kept = [name for name in before if name in after and "proj" not in name]
    assert len(kept) == 6
    assert all(after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.embed_tokens.weight.dtype == dtype


def test_settings_files_are_those_that_transformers_writes(tiny_model: Path, tmp_path: Path) -> None:
    config = BitloftConfig(QuantizeOptions(**SETTINGS))
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config).save_pretrained(tmp_path / "loaded")
    quantize(tiny_model, tmp_path / "out", **SETTINGS)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tmp_path / "loaded" / name).read_text())


def test_fp8_with_block_scales_is_what_it_stands_for(tiny_model: Path, tmp_path: Path) -> None:
    """Every projection in fp8, blocks of 32: the base is that of the dequantized fp32 model, byte for byte."""
    tensors = load_file(tiny_model / "model.safetensors")
    config = json.loads((tiny_model / "config.json").read_text())
    fp8, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "proj" not in name:
            continue
        scale = torch.rand(weight.shape[0] // 32, weight.shape[1] // 32) + 0.5
        codes = (weight * 8).to(torch.float8_e4m3fn)
        fp8 |= {name: codes, f"{name}_scale_inv": scale}
        plain[name] = codes.float() * scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    for where, weights in (("fp8", fp8), ("plain", plain)):
        shutil.copytree(tiny_model, tmp_path / where)
        save_file(weights, tmp_path / where / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    found = [quantize(tmp_path / where, tmp_path / f"q-{where}", **SETTINGS).fingerprint for where in ("fp8", "plain")]
    assert found[0] == found[1]
    quantize(tmp_path / "fp8", tmp_path / "skipped", skip=("up_proj",), **SETTINGS)
    kept = load_file(tmp_path / "skipped" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(kept, plain["model.layers.0.mlp.up_proj.weight"].bfloat16())
    load(tmp_path / "skipped")


def test_an_unknown_architecture_goes_by_names_and_shapes(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "ghost")
    file = tmp_path / "ghost" / "config.json"
    ghost = {"architectures": ["GhostForCausalLM"], "model_type": "ghost", "tie_word_embeddings": True}
    file.write_text(json.dumps(ghost))
    report = quantize(tmp_path / "ghost", tmp_path / "out", **SETTINGS)
    assert report.selection == "by names and shapes: no class is known"
    assert {m.name.rpartition(".")[2] for m in report.matrices} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(report.matrices) == 14
    known = quantize(tiny_model, tmp_path / "known", **SETTINGS)
    assert report.fingerprint == known.fingerprint
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules"].keys() == {m.name for m in report.matrices}
    assert config["model_type"] == "ghost"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def edited(model: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a model with some tensors replaced or, where None, left out."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, to / "model.safetensors", metadata={"format": "pt"})
    return to


UP = "model__layers__1__mlp__up_proj__weight"


def test_zero_matrices_and_equal_groups_are_quantized(tiny_model: Path, tmp_path: Path) -> None:
    equal = torch.full((96, 64), 0.25)
    edited(tiny_model, tmp_path / "m", **{UP: torch.zeros(96, 64), UP.replace("up", "gate"): equal})
    for spelling in ("nf2:64", "lm2:64", "uniform2:64", "nf4:128"):  # 128: a group larger than the row
        out = tmp_path / spelling.replace(":", "-")
        report = quantize(tmp_path / "m", out, format=spelling, rank=2)
        errors = {m.name: m.error_after for m in report.matrices}
        assert errors["model.layers.1.mlp.up_proj"] == 0.0
        assert errors["model.layers.1.mlp.gate_proj"] < 0.05
        layers = quant_linears(load(out))
        assert not layers["model.layers.1.mlp.up_proj"].dense().any()


@pytest.mark.parametrize(("value", "jobs"), [("inf", 1), ("nan", 2)])
def test_infinity_and_nan_name_their_tensor(tiny_model: Path, tmp_path: Path, value: str, jobs: int) -> None:
    weight = torch.zeros(96, 64)
    weight[5, 7] = float(value)
    edited(tiny_model, tmp_path / "m", **{UP: weight})
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.up_proj holds NaN or infinity.*stays in"):
        quantize(tmp_path / "m", tmp_path / "out", jobs=jobs, **SETTINGS)


def refusal(model: Path, out: Path, **settings: Any) -> str:
    with pytest.raises((CheckpointError, OptionError)) as caught:
        quantize(model, out, **SETTINGS | settings)
    assert not out.exists()
    assert not out.with_name(out.name + ".work").exists()
    return str(caught.value)


def test_a_checkpoint_that_is_not_the_config_s_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    edited(tiny_model, tmp_path / "shape", **{UP: torch.zeros(96, 32)})
    said = refusal(tmp_path / "shape", tmp_path / "out")
    assert "tensor model.layers.1.mlp.up_proj.weight has shape [96, 32], where LlamaForCausalLM with this" in said
    edited(tiny_model, tmp_path / "lacks", **{UP: None})
    said = refusal(tmp_path / "lacks", tmp_path / "out")
    assert "the checkpoint lacks model.layers.1.mlp.up_proj.weight (1 tensors of LlamaForCausalLM are missing)" in said


def test_what_the_class_has_no_place_for_is_listed(tiny_model: Path, tmp_path: Path) -> None:
    edited(tiny_model, tmp_path / "m", extra__weight=torch.zeros(2, 2))
    report = quantize(tmp_path / "m", tmp_path / "out", **SETTINGS)
    assert report.left["extra.weight"] == "no part of LlamaForCausalLM; it is not written"
    assert "extra.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_settings_of_the_run_are_checked(tiny_model: Path, tmp_path: Path) -> None:
    assert "jobs is 0; use 1 or more" in refusal(tiny_model, tmp_path / "out", jobs=0)
    assert "threads is -1; use 1 or more" in refusal(tiny_model, tmp_path / "out", threads=-1)
    for size in ("big", "0GB", "5"):
        assert f"shard_size is '{size}'" in refusal(tiny_model, tmp_path / "out", shard_size=size)


def test_threads_are_restored_and_part_of_the_identity(tiny_model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        assert torch.get_num_threads() == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, tmp_path / "out", threads=2, progress=stop, **SETTINGS)
    assert torch.get_num_threads() == 1
    with pytest.raises(CheckpointError, match="had threads 2, now it is 1"):
        quantize(tiny_model, tmp_path / "out", resume=True, **SETTINGS)


def test_a_resumed_run_needs_its_files(tiny_model: Path, tmp_path: Path) -> None:
    assert in_a_child(lambda: quantize(tiny_model, tmp_path / "out", progress=die_at(2), **SETTINGS)) == 9
    (tmp_path / "out.work" / "out" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the interrupted run lost its file"):
        quantize(tiny_model, tmp_path / "out", resume=True, **SETTINGS)
