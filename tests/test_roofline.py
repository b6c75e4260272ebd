"""The machine's roofline: what is measured, what a floor is, and that the command prints both."""

import pytest
import torch
from typer.testing import CliRunner

from bitloft import roofline
from bitloft.cli import app
from bitloft.roofline import Roof


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SIDE", 128), ("APART", 1 << 16), ("READ", 1 << 20), ("SECONDS", 0.001)):
        monkeypatch.setattr(roofline, name, value)


def test_a_roof_is_positive() -> None:
    roof = roofline.roof()
    assert 1e6 < roof.bandwidth < 1e13
    assert all(1e5 < rate < 1e15 for rate in roof.rates.values())
    assert set(roof.rates) == {torch.float32, torch.bfloat16}


def test_a_floor_is_the_slower_of_bytes_and_operations() -> None:
    slow_memory = Roof(1e3, {torch.float32: 1e30, torch.bfloat16: 1e30})
    slow_arithmetic = Roof(1e30, {torch.float32: 1e3, torch.bfloat16: 1e3})
    by_memory = {s.name: s for s in roofline.standings(slow_memory, 128)}
    by_work = {s.name: s for s in roofline.standings(slow_arithmetic, 128)}
    one = "packed_linear lm2:64 1 x float32"
    stored = 128 * 128 * 2 // 8 + 128 * 2 * 2 + 4  # codes, scales, exponent
    assert by_memory[one].floor == pytest.approx(stored / 1e3)
    assert by_work[one].floor == pytest.approx(2 * 128 * 128 / 1e3)
    assert (by_memory[one].bound, by_work[one].bound) == ("memory", "arithmetic")
    assert by_memory["decode lm2:64"].floor == pytest.approx((stored + 4 * 128 * 128) / 1e3)
    assert all(s.seconds > 0 for s in by_memory.values())
    assert by_memory.keys() >= {"encode nf4:64", "packed_linear nf4:64 256 x bfloat16"}


def test_info_bench_prints_the_machine_and_every_operator() -> None:
    printed = CliRunner().invoke(app, ["info", "--bench"]).output
    assert "GB/s" in printed
    assert "packed_linear lm2:64 1 x float32" in printed
    assert "bound by" in printed
    assert "GB/s" not in CliRunner().invoke(app, ["info"]).output
