"""The rotation is orthogonal, known from the width alone, and spreads what few inputs hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitloft.errors import OptionError
from bitloft.integrations.bitsandbytes import dense_reason
from bitloft.integrations.decoder import reason
from bitloft.integrations.loading import load
from bitloft.integrations.packing import unpack
from bitloft.integrations.peft import fresh_adapter, start_adapter
from bitloft.kernels.ops import decode
from bitloft.merge import merge
from bitloft.modules.linear import quant_linears
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from bitloft.solvers.rotation import rotated, rotated_moment, unrotated
from tests.helpers import WORDS


@pytest.mark.parametrize("columns", [1, 7, 64, 72, 576, 96])
def test_it_is_a_rotation(columns: int) -> None:
    turned = rotated(torch.eye(columns))
    assert torch.allclose(turned @ turned.T, torch.eye(columns), atol=1e-5)
    x = torch.randn(2, 3, columns)
    assert torch.allclose(unrotated(rotated(x)), x, atol=1e-5)
    assert torch.allclose(rotated(x), x @ turned, atol=1e-5)


def test_products_stay_and_moments_follow() -> None:
    x, weight = torch.randn(50, 72), torch.randn(5, 72)
    assert torch.allclose(rotated(x) @ rotated(weight).T, x @ weight.T, atol=1e-4)
    assert torch.allclose(rotated_moment(x.T @ x), rotated(x).T @ rotated(x), atol=1e-3)


def test_one_large_input_becomes_many_small_ones() -> None:
    x = torch.zeros(576)
    x[5] = 24.0
    turned = rotated(x)
    assert float(turned.abs().max()) < 2
    assert float(turned.norm()) == pytest.approx(24.0, rel=1e-5)


def test_the_signs_are_those_of_the_format() -> None:
    found = (rotated(torch.eye(16))[:, 0] > 0).int().tolist()
    assert found == [31383 >> i & 1 for i in range(16)]


def test_the_gradient_is_the_inverse() -> None:
    x, grad = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24)
    (found,) = torch.autograd.grad(rotated(x), x, grad)
    assert torch.allclose(found, unrotated(grad), atol=1e-5)
    assert rotated(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    report = quantize(tiny_model, tmp_path / "base", format="lm2:32", rank=4, rotate=True)
    assert all(m.error_after < 0.6 for m in report.matrices)
    return tmp_path / "base"


def test_a_rotated_base_computes_what_its_dense_matrices_do(tiny_model: Path, base: Path) -> None:
    model, ids = load(base), torch.arange(1, 9).unsqueeze(0)
    weights = load_file(tiny_model / "model.safetensors")
    layers = quant_linears(model)
    for matrix in json.loads((base / "bitloft_report.json").read_text())["matrices"]:
        weight, layer = weights[f"{matrix['name']}.weight"].float(), layers[matrix["name"]]
        assert layer.rotated
        assert float((weight - layer.dense()).norm() / weight.norm()) == pytest.approx(matrix["error_after"], rel=1e-4)
    with torch.no_grad():
        found = model(ids).logits
        unpack(model, torch.float32)
        assert torch.allclose(model(ids).logits, found, atol=1e-4)


def test_an_adapter_reads_inputs_as_they_are(base: Path) -> None:
    frozen, model, ids = load(base), load(base, start="trainable"), torch.arange(1, 9).unsqueeze(0)
    adapted = start_adapter(model)
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, frozen(ids).logits, atol=1e-4)
    assert "rotates its inputs" in (reason(frozen) or "")
    layer = next(iter(quant_linears(frozen).values()))
    assert dense_reason(frozen, "x", layer) == "its codes stand for rotated inputs"


@pytest.mark.parametrize("codes", ["kept", "new"])
def test_an_adapter_merges_into_a_rotated_base(base: Path, tmp_path: Path, codes: str) -> None:
    model = load(base)
    adapted = fresh_adapter(model, rank=2, alpha=2, targets=tuple(quant_linears(model)), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", codes=codes, base_mismatch="allow")
    wanted = {n: layer.dense() for n, layer in quant_linears(load(base)).items()}
    merged = quant_linears(load(tmp_path / "merged"))
    pairs = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    for name, layer in merged.items():
        lora = next(m for n, m in pairs.items() if n.endswith(name))
        target = wanted[name] + lora.lora_B["default"].weight.detach() @ lora.lora_A["default"].weight.detach()
        told = next(m.change for m in report.matrices if m.name == name)
        assert layer.rotated
        assert float((target - layer.dense()).norm() / target.norm()) == pytest.approx(told, rel=1e-2)


def test_refining_and_calibrating_work_on_rotated_inputs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LENGTH", 16), ("BATCH", 2), ("HELD", 4)):
        monkeypatch.setattr(f"bitloft.calibrate.refine.{name}", value)
    text = tmp_path / "text.txt"
    text.write_text(" ".join([WORDS] * 40), encoding="utf-8")
    given: dict[str, Any] = {"calibrate": str(text), "calibrate_length": 32, "samples": 8, "refine_rate": 3e-3}
    given |= {"solver": "calibrated", "refine": 12, "refine_parts": ("start", "codes")}
    report = quantize(tiny_model, tmp_path / "out", format="lm2:32", rank=8, rotate=True, **given)
    assert report.refined is not None
    assert report.refined.kept
    weights, layers = load_file(tiny_model / "model.safetensors"), quant_linears(load(tmp_path / "out"))
    for matrix in report.matrices:
        weight, layer = weights[f"{matrix.name}.weight"].float(), layers[matrix.name]
        assert float((weight - layer.dense()).norm() / weight.norm()) == pytest.approx(matrix.error_after, rel=1e-3)
        without = layer.turned(weight) - decode(layer.packed_weight())
        assert float(without.norm() / weight.norm()) == pytest.approx(matrix.error_before, rel=1e-3)


def test_qalora_cannot_be_rotated() -> None:
    with pytest.raises(OptionError, match="which rotate mixes"):
        QuantizeOptions(format="uniform4:32+shift", solver="qalora", rotate=True)
