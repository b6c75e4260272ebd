"""Reading PEFT directories: what is read, and a sentence for everything that is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitloft.adapters import read_adapter
from bitloft.errors import AdapterError, BitloftError, CheckpointError
from tests.helpers import make_adapter, shared

KEY = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(directory: Path, edit: Callable[[Tensors], Any]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_pairs_are_sorted_named_and_scaled(tmp_path: Path) -> None:
    found = read_adapter(make_adapter(tmp_path / "a", rank=4, alpha=8))
    assert [p.name for p in found.pairs] == sorted(p.name for p in found.pairs)
    assert len(found.pairs) == 14
    assert found.pairs[0].name == "model.layers.0.mlp.down_proj"
    assert (found.pairs[0].a.shape, found.pairs[0].b.shape, found.pairs[0].scaling) == ((4, 96), (64, 4), 2.0)
    assert found.values == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert (found.base, found.source, found.start) == (None, None, None)


def test_half_precision_factors_become_float32(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a")
    change_tensors(directory, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    assert {p.a.dtype for p in read_adapter(directory).pairs} == {torch.float32}


def test_rank_and_alpha_patterns_are_honoured(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a", rank=4, alpha=8)
    change_config(directory, rank_pattern={"0.self_attn.q_proj": 2}, alpha_pattern={"q_proj": 1}, use_rslora=True)

    def cut(tensors: Tensors) -> None:
        tensors[f"{KEY}.lora_A.weight"] = tensors[f"{KEY}.lora_A.weight"][:2].contiguous()
        tensors[f"{KEY}.lora_B.weight"] = tensors[f"{KEY}.lora_B.weight"][:, :2].contiguous()

    change_tensors(directory, cut)
    scalings = {p.name: p.scaling for p in read_adapter(directory).pairs}
    assert scalings["model.layers.0.self_attn.q_proj"] == 1 / 2**0.5
    assert scalings["model.layers.1.self_attn.q_proj"] == 1 / 4**0.5
    assert scalings["model.layers.1.self_attn.k_proj"] == 8 / 4**0.5


def test_fingerprints_come_from_the_record(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a")
    record = {"schema": 1, "base": "b" * 64, "source": "c" * 64, "start": "frozen"}
    (directory / "bitloft_adapter.json").write_text(json.dumps(record))
    found = read_adapter(directory)
    assert (found.base, found.source, found.start) == ("b" * 64, "c" * 64, "frozen")
    (directory / "bitloft_adapter.json").write_text(json.dumps(record | {"schema": 2}))
    with pytest.raises(AdapterError, match="written by another version"):
        read_adapter(directory)
    (directory / "bitloft_adapter.json").write_text(json.dumps(record | {"base": 5}))
    with pytest.raises(AdapterError, match="as strings"):
        read_adapter(directory)


def test_a_zero_adapter_is_read(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a")
    change_tensors(directory, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    assert not any(bool(p.b.any()) for p in read_adapter(directory).pairs)


def poison(key: str, value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[key][0, 0] = value

    return edit


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return edit


A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (poison(A, torch.nan), f"{A} of adapter .* holds NaN or infinity"),
        (poison(B, torch.inf), f"{B} of adapter .* holds NaN or infinity"),
        (lambda t: t.update({A: t[A].double() * 1e300}), "holds NaN or infinity \\(in float32\\)"),
        (lambda t: t.update({A: t[A].to(torch.int32)}), f"{A} of adapter .* is int32; factors are floats"),
        (lambda t: t.update({A: t[A][None, None]}), "has shape \\(1, 1, 4, 64\\)"),
        (lambda t: t.pop(B), "self_attn.q_proj of adapter .* lacks its lora_B.weight"),
        (lambda t: t.pop(A), "lacks its lora_A.weight"),
        (lambda t: t.clear(), "holds no LoRA factors"),
        (lambda t: t.update({A: t[A][:2].contiguous()}), r"has A \(2, 64\) and B \(64, 4\); its config says rank 4"),
        (renamed(A, "base_model.model.x.lora_embedding_A"), "lora_embedding tensors are not supported"),
        (renamed(A, "base_model.model.x.lora_magnitude_vector"), "lora_magnitude_vector tensors"),
        (renamed(A, "base_model.model.x.lora_A.bias"), "x.lora_A.bias: only lora_A.weight and lora_B.weight"),
        (renamed(A, "x.lora_A.weight"), "holds the tensor x.lora_A.weight"),
        (renamed(A, "base_model.model...lora_A.weight"), "'.', which is not a module path"),
        (renamed(A, "base_model.model.a/../b.lora_A.weight"), "which is not a module path"),
        (renamed(A, "base_model.model..lora_A.weight"), "which is not a module path"),
    ],
)
def test_tensors_that_are_not_lora_are_refused(tmp_path: Path, edit: Callable[[Tensors], Any], words: str) -> None:
    directory = make_adapter(tmp_path / "a")
    change_tensors(directory, edit)
    with pytest.raises(AdapterError, match=words):
        read_adapter(directory)


def test_a_rank_above_the_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has rank 40 above min\(m, n\) = 32"):
        read_adapter(make_adapter(tmp_path / "a", rank=40))


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a")
    entry = '{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}'
    header = f'{{"{A}":{entry},"{A}":{entry}}}'.encode()
    (directory / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(BitloftError, match=r"twice|not a valid safetensors"):
        read_adapter(directory)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda d: shutil.rmtree(d), "is not a directory; give the folder of a PEFT adapter"),
        (lambda d: (d / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
        (
            lambda d: (d / "adapter_config.json").write_text(" " * (5 << 20)),
            "has 5242880 bytes; such a file stays under",
        ),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (
            lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
            r"only as a pickle \(adapter_model.bin\), which can run code",
        ),
        (
            lambda d: (d / "adapter_model.safetensors").write_bytes(
                (d / "adapter_model.safetensors").read_bytes()[:-9]
            ),
            "truncated",
        ),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01."), "safetensors"),
    ],
)
def test_missing_and_damaged_files(tmp_path: Path, broken: Callable[[Path], Any], words: str) -> None:
    directory = make_adapter(tmp_path / "a")
    broken(directory)
    with pytest.raises(BitloftError, match=words):
        read_adapter(directory)


def test_training_args_are_never_opened(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a")
    (directory / "training_args.bin").write_bytes(b"not a pickle")
    (directory / "training_args.bin").chmod(0)
    assert len(read_adapter(directory).pairs) == 14


def test_a_conv1d_adapter_of_gpt2() -> None:
    """fan_in_fan_out: the base weight is transposed, A [r, in] and B [out, r] are as everywhere."""
    found = read_adapter(shared("adapters/gpt2-tigrinya-r8"))
    pair = next(p for p in found.pairs if p.name == "transformer.h.0.attn.c_attn")
    assert (pair.a.shape, pair.b.shape, pair.scaling) == ((8, 768), (2304, 8), 4.0)
    assert found.values == 811008


def test_a_pickle_error_is_a_checkpoint_error(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.pt")
    with pytest.raises(CheckpointError, match="convert it to safetensors first"):
        read_adapter(directory)
