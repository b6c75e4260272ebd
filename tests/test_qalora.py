"""QA-LoRA: a pooled adapter merges into shifts, exactly but for their fp16 rounding, here and through PEFT."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitloft.errors import AdapterError, OptionError
from bitloft.formats import Format
from bitloft.integrations import register
from bitloft.integrations.transformers import BitloftConfig
from bitloft.kernels.ops import decode, encode
from bitloft.modules.linear import quant_linears
from bitloft.options import QuantizeOptions
from bitloft.packed import unpack_halves
from bitloft.rules import plan_of
from bitloft.solvers import solve
from bitloft.solvers.qalora import merge_pooled, qalora

FORMATS = ("uniform4:32+shift", "uniform2:64+shift", "lm2:32+shift", "nf4:64+dq+shift", "book3:32+shift")


def factors(rows: int, columns: int, fmt: Format, scale: float = 0.1) -> tuple[Tensor, Tensor]:
    """A [4, groups] and B [rows, 4]."""
    return torch.randn(4, fmt.groups(columns)), torch.randn(rows, 4) * scale


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("columns", [128, 100])
def test_only_the_shifts_change_and_to_the_nearest_half(spelling: str, columns: int) -> None:
    fmt = Format.parse(spelling)
    packed = encode(torch.randn(24, columns), fmt)
    a, b = factors(24, columns, fmt, 0.01)
    merged = merge_pooled(packed, a, b, 2.0)
    assert packed.shifts is not None
    assert merged.shifts is not None
    assert torch.equal(merged.codes, packed.codes)
    wanted = unpack_halves(packed.shifts, packed.exponent) + 2.0 * b @ a
    found = unpack_halves(merged.shifts, merged.exponent)
    assert bool((found - wanted).abs().le(wanted.abs() * 2**-11 + 2.0 ** (int(merged.exponent) - 24)).all())
    unshifted = decode(merged) - found.repeat_interleave(fmt.group, 1)[:, :columns]
    before = decode(packed) - unpack_halves(packed.shifts, packed.exponent).repeat_interleave(fmt.group, 1)[:, :columns]
    torch.testing.assert_close(unshifted, before, atol=1e-5, rtol=1e-5)


def test_large_shifts_raise_the_exponent_and_keep_scales() -> None:
    packed = encode(torch.randn(8, 64), "uniform4:32+shift")
    merged = merge_pooled(packed, torch.full((1, 2), 1e6), torch.ones(8, 1), 1.0)
    assert int(merged.exponent) > int(packed.exponent)
    assert torch.equal(unpack_halves(merged.scales, merged.exponent), unpack_halves(packed.scales, packed.exponent))
    assert float(decode(merged).mean()) == pytest.approx(1e6, rel=1e-3)


def test_the_solver_rounds_and_stores_no_start() -> None:
    options = QuantizeOptions(solver="qalora", format="uniform4:32+shift")
    weight = torch.randn(32, 64)
    found = solve("w", weight, plan_of(options), options)
    assert found.start is None
    assert torch.equal(found.weight.codes, encode(weight, "uniform4:32+shift").codes)


def test_bad_input_is_refused() -> None:
    with pytest.raises(OptionError, match=r"which lm2:64 does not store; use lm2:64\+shift"):
        qalora(torch.randn(8, 64), Format.parse("lm2:64"))
    packed = encode(torch.randn(8, 64), "lm2:32+shift")
    with pytest.raises(OptionError, match=r"has A \[rank, 2\] and B \[8, rank\]; found \(4, 64\) and \(8, 4\)"):
        merge_pooled(packed, torch.zeros(4, 64), torch.zeros(8, 4), 1.0)


def quantized(folder: Path, fmt: str) -> PreTrainedModel:
    register()
    config = BitloftConfig(QuantizeOptions(solver="qalora", format=fmt))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def pooled_config(size: int) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, use_qalora=True, qalora_group_size=size, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def test_trained_through_peft_merged_saved_and_loaded_as_a_low_bit_base(tiny_model: Path, tmp_path: Path) -> None:
    model = quantized(tiny_model, "uniform4:32+shift")
    ids = torch.arange(24).reshape(2, 12)
    plain = model(ids).logits.detach()
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    adapted = get_peft_model(model, pooled_config(32))
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    trained = adapted(ids).logits.detach()
    merged = adapted.merge_and_unload()
    found = merged(ids).logits.detach()
    assert len(quant_linears(merged)) == 14
    assert sum(t.numel() * t.element_size() for t in merged.state_dict().values()) == stored
    moved = float((trained - plain).norm())
    assert float((found - trained).norm()) < 0.01 * moved  # 2**-11 of the shifts against what training moved
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert torch.equal(again(ids).logits, found)


def test_bases_that_cannot_pool_are_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(
        AdapterError, match=r"groups of 64 needs a base whose format has such groups.*uniform4:32\+shift"
    ):
        get_peft_model(quantized(tiny_model, "uniform4:32+shift"), pooled_config(64))
    model = quantized(tiny_model, "uniform4:32+shift")
    adapted = get_peft_model(model, pooled_config(32))
    adapted.merge_adapter()
    with pytest.raises(AdapterError, match="was rounded and cannot be undone"):
        adapted.unmerge_adapter()
