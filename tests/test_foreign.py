"""Other tools' quantized bases, dequantized as those tools do it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from bitloft.errors import CheckpointError
from bitloft.integrations.foreign import open_foreign, stream

NAME = "model.layers.0.self_attn.q_proj"


def folder(directory: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": settings}), encoding="utf-8")
    return directory


def bnb_folder(directory: Path, weight: Tensor, **settings: Any) -> tuple[Path, Tensor]:
    """A one-matrix bitsandbytes folder, and what bitsandbytes makes of it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, **settings)
    parts = {f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    made = folder(directory, parts | {f"{NAME}.weight": codes}, {"load_in_4bit": True, "quant_method": "bitsandbytes"})
    return made, functional.dequantize_4bit(codes, state)


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as rows of int32 words, by Python integers: an independent packing."""
    rows = []
    for row in codes.tolist():
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)  # wraps as two's complement


def gptq_folder(directory: Path, bits: int, *, order: bool = False, v2: bool = False) -> tuple[Path, Tensor]:
    """A GPTQ matrix [64 out, 96 in] in groups of 32 from random codes, and the weight that it stands for."""
    codes = torch.randint(0, 2**bits, (96, 64))
    zeros = torch.randint(1, 2**bits, (3, 64))
    scales = (torch.rand(3, 64) + 0.5).half()
    index = torch.arange(96) // 32
    if order:
        index = index[torch.randperm(96)]
    weight = (scales.float()[index] * (codes - zeros[index])).T
    parts = {
        f"{NAME}.qweight": words(codes.T, bits).T,
        f"{NAME}.qzeros": words(zeros - (0 if v2 else 1), bits),
        f"{NAME}.scales": scales,
        f"{NAME}.g_idx": index.to(torch.int32),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order}
    return folder(directory, parts, settings | ({"checkpoint_format": "gptq_v2"} if v2 else {})), weight


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_is_read_as_bitsandbytes_reads_it(tmp_path: Path, double: bool, kind: str) -> None:
    weight = torch.randn(190, 128)  # 380 blocks: the last group of double-quantized scales is short
    made, expected = bnb_folder(tmp_path / "b", weight, blocksize=64, compress_statistics=double, quant_type=kind)
    found = open_foreign(made)
    assert found.matrices == (NAME,)
    torch.testing.assert_close(found.read(NAME), expected.float(), atol=1e-5, rtol=1e-5)


def test_blocks_that_run_over_the_end_of_a_row(tmp_path: Path) -> None:
    """bitsandbytes 0.50 itself decodes these wrongly on a processor, so the weight is the judge."""
    weight = torch.randn(7, 96)
    made, _ = bnb_folder(tmp_path / "b", weight, blocksize=64, quant_type="nf4")
    assert float((open_foreign(made).read(NAME) - weight).norm() / weight.norm()) < 0.11


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_gptq_gives_the_weight_that_its_parts_stand_for(tmp_path: Path, bits: int, order: bool) -> None:
    made, expected = gptq_folder(tmp_path / "g", bits, order=order)
    found = open_foreign(made)
    assert (found.kind, found.matrices) == (f"gptq {bits} bit", (NAME,))
    torch.testing.assert_close(found.read(NAME), expected)
    assert [name for name, _ in found] == [NAME]


def test_gptq_v2_stores_its_zeros_whole(tmp_path: Path) -> None:
    made, expected = gptq_folder(tmp_path / "g", 4, v2=True)
    torch.testing.assert_close(open_foreign(made).read(NAME), expected)


@given(bits=st.sampled_from([2, 3, 4, 8]), codes=st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_streams_of_bits_come_back(bits: int, codes: list[int]) -> None:
    row = torch.tensor([[code % 2**bits for code in codes]])
    assert torch.equal(stream(words(row, bits), len(codes), bits), row.float())


def test_other_bases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no quantized base; give a bitsandbytes or GPTQ folder"):
        open_foreign(tmp_path / "nowhere")
    plain = folder(tmp_path / "plain", {"w": torch.zeros(2, 2)}, {})
    with pytest.raises(CheckpointError, match="is quantized by nothing; a start can be made for"):
        open_foreign(plain)
    awq = folder(tmp_path / "awq", {"w": torch.zeros(2, 2)}, {"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="is quantized by awq"):
        open_foreign(awq)
    five = folder(tmp_path / "five", {"w": torch.zeros(2, 2)}, {"quant_method": "gptq", "bits": 5})
    with pytest.raises(CheckpointError, match="GPTQ codes of 5 bits; 2, 3, 4 and 8 can be read"):
        open_foreign(five)
    empty = folder(tmp_path / "empty", {"w": torch.zeros(2, 2)}, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="says that it is gptq 4 bit, but holds no matrix of that kind"):
        open_foreign(empty)


def damaged(source: Path, directory: Path, change: dict[str, Tensor | None]) -> Path:
    """A copy of a folder with some tensors replaced, or removed."""
    from safetensors.torch import load_file

    tensors = {k: v for k, v in (load_file(source / "model.safetensors") | change).items() if v is not None}
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return folder(directory, tensors, settings)


def test_damage_is_named(tmp_path: Path) -> None:
    gptq, _ = gptq_folder(tmp_path / "g", 4)
    bnb, _ = bnb_folder(tmp_path / "b", torch.randn(64, 64), blocksize=64, quant_type="nf4")
    state = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    changes: list[tuple[Path, dict[str, Tensor | None], str]] = [
        (gptq, {f"{NAME}.qzeros": None}, f"lacks the tensor {NAME}.qzeros"),
        (gptq, {f"{NAME}.g_idx": torch.full((96,), 3, dtype=torch.int32)}, "names groups that do not exist"),
        (gptq, {f"{NAME}.scales": torch.ones(3, 63).half()}, "do not fit each other"),
        (gptq, {f"{NAME}.qzeros": torch.zeros(3, 1, dtype=torch.int32)}, "1 words cannot hold 64 codes of 4 bits"),
        (bnb, {f"{NAME}.weight.absmax": None}, f"lacks the tensor {NAME}.weight.absmax"),
        (bnb, {f"{NAME}.weight.absmax": torch.ones(3)}, "holds 4096 codes and 3 scales for a shape of"),
        (bnb, {state: None}, "lacks the quant_state"),
        (bnb, {state: torch.tensor([65, 66], dtype=torch.uint8)}, "cannot be read"),
    ]
    for number, (source, change, words_) in enumerate(changes):
        with pytest.raises(CheckpointError, match=words_):
            open_foreign(damaged(source, tmp_path / str(number), change)).read(NAME)
