"""plan.py: stages from counted bytes and measured rates, replicas, a simulation, and refusals that say why."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitloft.checkpoint import weight_files
from bitloft.errors import OptionError
from bitloft.machine import Machine, Rates, settings, write_machine
from bitloft.options import PlanOptions
from bitloft.plan import page_of, plan, rows_of
from bitloft.quantize import quantize

ASKED: dict[str, Any] = {"format": "lm2:64", "rank": 4, "adapter_rank": 4, "adapters": 500, "played": 2000}
SECONDS = {
    "quantize": {"matrices": 0.01, "weights": 1e-7, "bytes": 1e-9, "runs": 0.5},
    "train": {"weights_tokens": 1e-9, "layers": 0.01},
    "compress": {"modules": 0.02},
    "prefill": {"weights_tokens": 1e-9, "layers": 0.001},
    "decode": {"weights": 1e-9, "layers_rows": 1e-4},
}


def machine(**changes: Any) -> Machine:
    asked = settings(PlanOptions(**ASKED), "lm2:64")
    rates = tuple(Rates(kind, asked[kind], seconds) for kind, seconds in SECONDS.items())
    return replace(Machine("m", 2, 24_000_000_000, price=0.36, rates=rates), **changes)


def test_bytes_need_no_machine(tiny_model: Path, tmp_path: Path) -> None:
    report = plan(tiny_model, **ASKED)
    quantize(tiny_model, tmp_path / "base", PlanOptions(**ASKED).quantizing())
    assert report.stage("quantize").disk == sum(f.stat().st_size for f in weight_files(tmp_path / "base"))
    assert report.stage("compress").disk == 500 * report.footprint.adapter_packed
    assert all(stage.seconds is None for stage in report.stages)
    assert (report.machine, report.replicas, report.outcome) == (None, None, None)
    assert report.adapters_per_gib == pytest.approx((1 << 30) / report.footprint.adapter_packed)


@pytest.mark.parametrize(("solver", "fmt"), [("qalora", "uniform2:32+shift"), ("calibrated", "lm2:64")])
def test_bytes_of_the_other_solvers(solver: str, fmt: str, tiny_model: Path, tmp_path: Path) -> None:
    """Layouts do not depend on what was measured, so that the run needs no text."""
    asked = ASKED | {"solver": solver, "format": fmt}
    quantize(tiny_model, tmp_path / "base", replace(PlanOptions(**asked).quantizing(), metric="none"))
    written = sum(f.stat().st_size for f in weight_files(tmp_path / "base"))
    assert plan(tiny_model, **asked).stage("quantize").disk == written


def test_times_of_the_other_solvers(tiny_model: Path) -> None:
    """From rates of their own alone, never from another solver's."""
    asked = ASKED | {"solver": "calibrated"}
    with pytest.raises(OptionError, match=r"no rates of quantize .*solver calibrated.*--measure"):
        plan(tiny_model, machine=machine(), **asked)
    setting = settings(PlanOptions(**asked), "lm2:64")["quantize"]
    held = replace(machine(), rates=(*machine().rates, Rates("quantize", setting, {"weights": 1e-6})))
    report = plan(tiny_model, machine=held, **asked)
    assert report.stage("quantize").seconds == pytest.approx(report.footprint.weights * 1e-6)
    work = {"weights_tokens": 1e-12, "moments": 1e-12, "cubes": 1e-10, "squares": 1e-10}
    held = replace(machine(), rates=(*machine().rates, Rates("quantize", setting, work)))
    asked |= {"samples": 3, "calibrate_length": 100}
    shapes = [(s.rows, s.columns, s.count) for s in report.footprint.shapes]
    moments = sum(count * columns**2 for _, columns, count in shapes)
    cubes = sum(count * (columns**3 + rows * columns**2) for rows, columns, count in shapes)
    wanted = 300e-12 * (report.footprint.weights + moments) + 1e-10 * cubes
    assert plan(tiny_model, machine=held, **asked).stage("quantize").seconds == pytest.approx(wanted)
    with pytest.raises(OptionError, match=r"no rates of quantize .*solver qalora.*--measure"):
        plan(tiny_model, machine=machine(), **ASKED | {"solver": "qalora"} | {"format": "uniform2:32+shift"})


def test_times_are_features_times_rates(tiny_model: Path) -> None:
    report, found = plan(tiny_model, machine=machine(), **ASKED), plan(tiny_model, **ASKED).footprint
    wanted = 14 * 0.01 + found.weights * 1e-7 + found.source * 1e-9 + 0.5
    assert report.stage("quantize").seconds == pytest.approx(wanted)
    step = found.weights * 4 * 512 * 1e-9 + 2 * 0.01
    assert report.stage("train").seconds == pytest.approx(1000 * step)
    assert report.stage("compress").seconds == pytest.approx(500 * 14 * 0.02 / 2)
    reading, writing = found.weights * 256 * 1e-9 + 0.002, 128 * (found.weights * 1e-9 + 8 * 2 * 1e-4)
    assert report.throughput == pytest.approx(1 / (reading + writing / 8))
    assert report.outcome is not None
    assert report.outcome.exact
    assert report.outcome.cost == pytest.approx(report.replicas * 0.36 / 3600 * 1e6)  # type: ignore[operator]


def test_nodes_jobs_and_load(tiny_model: Path) -> None:
    one = plan(tiny_model, machine=machine(), **ASKED)
    four = plan(tiny_model, machine=machine(nodes=4, efficiency=0.9), **ASKED)
    assert one.stage("train").seconds == pytest.approx(3.6 * four.stage("train").seconds)  # type: ignore[operator]
    busy = plan(tiny_model, machine=machine(), **ASKED | {"requests": 1000.0})
    assert busy.replicas is not None
    assert busy.throughput is not None
    assert (busy.replicas - 1) * 0.7 * busy.throughput < 1000 <= busy.replicas * 0.7 * busy.throughput
    small = plan(tiny_model, machine=machine(), **ASKED | {"adapter_budget": "20kB"})
    assert small.budget == 20_000
    assert small.outcome is not None
    assert small.outcome.hit_rate < 0.9


def test_page_and_rows(tiny_model: Path) -> None:
    report = plan(tiny_model, machine=machine(), **ASKED)
    html = page_of(report, PlanOptions(**ASKED))
    assert html.count("data:image/svg+xml") == 2
    assert [row[0] for row in rows_of(report)] == ["quantize", "train", "compress", "serve"]
    assert report.to_dict()["footprint"]["base"] == report.footprint.base


def test_refusals(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no rates of quantize for format nf4:64"):
        plan(tiny_model, machine=machine(), **ASKED | {"format": "nf4:64"})
    with pytest.raises(OptionError, match=r"takes [\d,]+ bytes without any adapter, and m has 1,000"):
        plan(tiny_model, machine=machine(memory=1000), **ASKED)
    with pytest.raises(OptionError, match="measuring writes a machine file; name it"):
        plan(tiny_model, measure=True, **ASKED)
    with pytest.raises(OptionError, match="cannot read the machine file"):
        plan(tiny_model, machine=tmp_path / "none.toml", **ASKED)
    write_machine(tmp_path / "m.toml", machine())
    assert plan(tiny_model, machine=tmp_path / "m.toml", **ASKED).machine == "m"
    for wrong, sentence in (
        ({"router": "nearest"}, "unknown router"), ({"zipf": -1.0}, "zipf is -1.0; use 0 to 10"),
        ({"utilisation": 1.5}, "utilisation is 1.5"), ({"solver": "gptq"}, "unknown solver"),
        ({"adapters": 0}, "adapters is 0; use a positive number"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=sentence):
            PlanOptions(**wrong)
