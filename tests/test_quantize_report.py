"""quantize_report.py: sums over matrices, and what of a report lasts from run to run."""

import pytest

from bitloft.quantize_report import MatrixReport, QuantizeReport

ROWS = (
    MatrixReport("a", "lm2:64", (64, 64), 0.4, 0.3, 1152, 256, 1.5),
    MatrixReport("b", "lm2:64", (128, 64), 0.4, 0.3, 2304, 384, 2.5),
    MatrixReport("c", "nf4:64", (64, 64), 0.1, 0.1, 2176, 0, 0.5),
)


def report() -> QuantizeReport:
    return QuantizeReport("base", "model", "f" * 64, ROWS, {}, (), 100, 20, 50_000, 6000, seconds=4.5, resumed=1)


def test_sums() -> None:
    found = report()
    assert found.weights == 4096 + 8192 + 4096
    assert found.formats == "lm2:64 (2), nf4:64 (1)"
    assert found.payload_bits == pytest.approx((2 * 12288 + 4 * 4096) / 16384)
    assert found.true_bits == pytest.approx(8 * (1152 + 2304 + 2176) / 16384)
    assert found.true_bits_with_start == pytest.approx(8 * (1152 + 2304 + 2176 + 640) / 16384)


def test_what_lasts_tells_no_time_and_no_place() -> None:
    everything, lasting = report().to_dict(), report().lasting()
    assert everything["seconds"] == 4.5
    assert everything["matrices"][0]["true_bits"] == pytest.approx(8 * 1152 / 4096)
    assert not {"out", "seconds", "resumed"} & set(lasting)
    assert not any("seconds" in row for row in lasting["matrices"])
    assert lasting["weights"] == everything["weights"]
