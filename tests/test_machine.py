"""machine.py: fits that find the coefficients, files that read back, and a measurement at toy size."""

from pathlib import Path

import numpy as np
import pytest

from bitloft.errors import OptionError
from bitloft.machine import (
    KINDS,
    SMALL,
    Machine,
    Rates,
    fitted,
    gathering,
    measure,
    read_machine,
    settings,
    solving,
    write_machine,
)
from bitloft.options import PlanOptions

SETTING = {"format": "lm2:64", "rank": 4}


def test_a_fit_finds_what_made_the_times() -> None:
    random = np.random.default_rng(0)
    truth = {"matrices": 0.002, "weights": 3e-8, "edges": 0.0}
    rows = []
    for _ in range(12):
        features = {
            "matrices": 1.0,
            "weights": float(random.integers(1000, 10_000_000)),
            "edges": float(random.integers(10, 999)),
        }
        rows.append((features, sum(truth[name] * value for name, value in features.items())))
    found = fitted(rows)
    assert found["weights"] == pytest.approx(3e-8, rel=1e-6)
    assert found["matrices"] == pytest.approx(0.002, rel=1e-6)
    assert found.get("edges", 0.0) == pytest.approx(0, abs=1e-12)
    falling = fitted([({"a": 1.0, "b": 1.0}, 2.0), ({"a": 1.0, "b": 2.0}, 1.0)])  # more work in less time: noise
    assert all(value >= 0 for value in falling.values())


def test_files_read_back(tmp_path: Path) -> None:
    rates = (
        Rates("quantize", SETTING, {"weights": 1.5e-8, "matrices": 0.25}),
        Rates("decode", SETTING, {"layers": 1e-4}),
    )
    machine = Machine('a "quoted" name', 2, 24_000_000_000, nodes=4, price=0.5, rates=rates)
    write_machine(tmp_path / "m.toml", machine)
    assert read_machine(tmp_path / "m.toml") == machine
    assert machine.seconds("quantize", SETTING, {"weights": 1e6, "matrices": 2, "unknown": 9}) == pytest.approx(0.515)
    with pytest.raises(OptionError, match=r"no rates of train for format lm2:64, rank 4; measure it there"):
        machine.seconds("train", SETTING, {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense", "is no machine file"),
        ("[machine]\nname = 'x'\ncores = 2\nmemory = 0", "is no machine file .*not positive"),
        ("[machine]\nname = 'x'\ncores = 2\nmemory = 1\nspeed = 3", "is no machine file .*speed"),
        (
            "[machine]\nname = 'x'\ncores = 2\nmemory = 1\n[[rates]]\nkind = 'fly'\nsetting = {}\nseconds = {}",
            "unknown",
        ),
    ],
)
def test_bad_files(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(OptionError, match=sentence):
        read_machine(tmp_path / "m.toml")
    with pytest.raises(OptionError, match=r"cannot read the machine file .*--measure"):
        read_machine(tmp_path / "none.toml")


def test_qalora_is_measured_with_its_own_format() -> None:
    fmt = "uniform2:32+shift"
    options = PlanOptions(format=fmt, solver="qalora", rank=0, adapter_rank=4, batch=1, length=16)
    found = measure(options, [fmt], Machine("here", 1, 1), models=SMALL)
    assert found.seconds("quantize", settings(options, fmt)["quantize"], {"weights": 1e9, "matrices": 100}) > 0


def test_calibrated_is_measured_with_a_text() -> None:
    options = PlanOptions(format="lm2:64", solver="calibrated", rank=4)
    found = measure(options, ["lm2:64"], Machine("here", 1, 1), models=SMALL, kinds=("quantize",))
    assert [rates.kind for rates in found.rates] == ["quantize"]
    setting = settings(options, "lm2:64")["quantize"]
    work = solving(options, 4096, 4096) | gathering(options, [(4096, 4096)], 65536)
    assert found.seconds("quantize", setting, work) > 0
    assert gathering(PlanOptions(), [(64, 64)], 10) == {}


def test_a_measurement_at_toy_size() -> None:
    options = PlanOptions(format="lm2:64", rank=4, adapter_rank=4, batch=1, length=16)
    told: list[tuple[int, int, str]] = []
    before = Machine("here", 1, 1, rates=(Rates("train", SETTING, {"layers": 1.0}),))
    found = measure(options, ["lm2:64"], before, models=SMALL, progress=lambda *a: told.append(a))
    assert told == [(1, 1, "lm2:64")]
    assert before.rates[0] in found.rates  # other settings stay
    for kind, setting in settings(options, "lm2:64").items():
        mine = [rates for rates in found.rates if (rates.kind, rates.setting) == (kind, setting)]
        assert len(mine) == 1, kind
        assert all(value >= 0 for value in mine[0].seconds.values())
    assert {rates.kind for rates in found.rates} <= set(KINDS)
    again = measure(options, ["lm2:64"], found, models=SMALL[:1])
    assert len(again.rates) == len(found.rates)  # measured anew, not twice
