"""fanout.py: quantizing on Ray gives the bytes of a local run, whatever dies, and refuses what would not."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bitloft import fanout
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.ray import Cluster
from bitloft.integrations.source import open_source
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from bitloft.stream import make_plan
from tests.helpers import WORDS, tiny_llama

SETTINGS: dict[str, Any] = {"format": "lm2:64", "rank": 4}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the one that tells when and how fast."""
    return {f.name: f.read_bytes() for f in sorted(directory.iterdir()) if f.name != "bitloft_times.json"}


def test_the_bytes_are_those_of_a_local_run(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    quantize(tiny_model, tmp_path / "here" / "base", **SETTINGS)
    cluster = Cluster(workers=2)
    report = quantize(
        tiny_model, tmp_path / "there" / "base", cluster=cluster, progress=lambda *a: told.append(a), **SETTINGS
    )
    assert contents(tmp_path / "here" / "base") == contents(tmp_path / "there" / "base")
    assert [done for done, _, _ in told] == list(range(1, 15))
    assert report.out == str(tmp_path / "there" / "base")


def test_calibrated_matrices_of_a_block_go_out_together(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((WORDS + "\n") * 40)
    settings = SETTINGS | {"solver": "calibrated", "calibrate": str(text), "samples": 4, "calibrate_length": 32}
    quantize(tiny_model, tmp_path / "here" / "base", **settings)
    quantize(tiny_model, tmp_path / "there" / "base", cluster=Cluster(workers=2), **settings)
    assert contents(tmp_path / "here" / "base") == contents(tmp_path / "there" / "base")


def test_a_run_whose_workers_are_killed_ends_in_the_same_bytes(ray_cluster: None, tmp_path: Path) -> None:
    """Worker processes are found as children of the raylet and killed twice while the run goes on."""
    model = tiny_llama(tmp_path / "model", layers=6)
    quantize(model, tmp_path / "here" / "base", **SETTINGS)
    killed: list[int] = []

    def kill(done: int, total: int, about: str) -> None:
        if done in (3, 20):
            pid = worker()
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    quantize(model, tmp_path / "there" / "base", cluster=Cluster(workers=2, attempts=4), progress=kill, **SETTINGS)
    assert killed
    assert contents(tmp_path / "here" / "base") == contents(tmp_path / "there" / "base")


def worker() -> int | None:
    """A process that works on a task at this moment."""
    for _ in range(100):
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if place.read_bytes().startswith(b"ray::_task"):
                    return int(place.parent.name)
            except OSError:
                continue
        time.sleep(0.01)
    return None


def test_a_run_that_stopped_on_ray_goes_on_here(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int, about: str) -> None:
        if done == 5:
            raise StopError

    out = tmp_path / "there" / "base"
    with pytest.raises(StopError):
        quantize(tiny_model, out, cluster=Cluster(workers=2), progress=stop, **SETTINGS)
    report = quantize(tiny_model, out, resume=True, **SETTINGS)
    assert report.resumed == 5
    quantize(tiny_model, tmp_path / "here" / "base", **SETTINGS)
    assert contents(tmp_path / "here" / "base") == contents(out)


def test_what_does_not_go_together(tiny_model: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"jobs": 2, "cluster": Cluster()}, "jobs is 2, but a cluster has workers"),
        ({"threads": 2, "cluster": Cluster()}, "threads is 2, and that of the cluster is 1"),
    )
    for wrong, sentence in cases:
        with pytest.raises(OptionError, match=sentence):
            quantize(tiny_model, tmp_path / "out", **SETTINGS, **wrong)
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(OptionError, match="GGUF file is converted whole"):
        quantize(gguf, tmp_path / "out", cluster=Cluster(), **SETTINGS)


def test_a_node_that_sees_another_model_or_computes_otherwise(tiny_model: Path, tmp_path: Path) -> None:
    """What a worker does before its first task, called here."""
    options, capability = QuantizeOptions(**SETTINGS), torch.backends.cpu.get_cpu_capability()
    plan = make_plan(open_source(str(tiny_model)), options)
    digest = fanout._digest(plan)
    assert fanout._prepare(str(tiny_model), options, 1, digest, capability).steps.keys() == plan.steps.keys()
    with pytest.raises(CheckpointError, match="begun on a processor with NEON and this one has"):
        fanout._prepare(str(tiny_model), options, 1, digest, "NEON")
    other = tiny_llama(tmp_path / "other", hidden=32)
    with pytest.raises(CheckpointError, match="holds another model here"):
        fanout._prepare(str(other), options, 1, digest, capability)
