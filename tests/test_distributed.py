"""integrations/distributed.py and training by two processes (gloo, CPU): the curve of one, whole files, resumption."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitloft.checkpoint import read_json, read_tensors
from bitloft.errors import OptionError
from bitloft.integrations import distributed
from bitloft.quantize import quantize
from bitloft.train import train
from tests.helpers import WORDS, write_rows

ROOT = Path(__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"
SMALL: dict[str, Any] = {
    "steps": 6,
    "rank": 4,
    "length": 48,
    "lr": 1e-2,
    "dtype": "float32",
    "save_every": 3,
    "log_every": 1,
}
# what each of the two processes runs: trainings one after the other; ``die`` ends both hard after that step
SCRIPT = """
import json, os, sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from bitloft.train import train
from bitloft.modules.linear import quant_linears
base, data = sys.argv[1:3]
for job in json.loads(sys.argv[3]):
    die, out = job.pop("die", None), job.pop("out")
    def tell(step, steps, text):
        if step == die:
            os._exit(9)
    if die and int(os.environ["RANK"]):
        tell = None  # the launcher ends this one
    train(base, data, out, progress=tell, **job)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def launch(base: Path, data: Path, jobs: list[dict[str, Any]], port: int) -> int:
    """Run jobs by two processes under torchrun; its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    script = base.parent / "job.py"
    script.write_text(SCRIPT)
    given = [str(script), str(base), str(data), json.dumps(jobs)]
    done = subprocess.run([*command, *given], cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode and not any("die" in job for job in jobs):
        raise RuntimeError(done.stderr[-3000:])
    return done.returncode


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "base"
    quantize(tiny_model, out, format="lm2:32", rank=4)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = WORDS.split()
    rows: list[dict[str, object]] = [{"text": " ".join(words[i % 7 :] + words[: i % 11])} for i in range(24)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def runs(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process; two with copies; two with parts; and the last two again, killed at step 5 and resumed from 3."""
    place = tmp_path_factory.mktemp("runs")
    train(base, data, place / "one", batch=2, accumulate=4, **SMALL)
    both = SMALL | {"batch": 2, "accumulate": 2}
    ddp, shard = both | {"out": str(place / "ddp")}, both | {"out": str(place / "shard"), "shard": True}
    cut = shard | {"out": str(place / "cut"), "die": 5}
    assert launch(base, data, [ddp, shard, cut], 29701)
    assert (place / "cut.work" / "checkpoint-3" / "complete.json").exists()
    launch(base, data, [shard | {"out": str(place / "cut"), "resume": True}], 29702)
    assert launch(base, data, [ddp | {"out": str(place / "cut-ddp"), "die": 5}], 29703)
    launch(base, data, [ddp | {"out": str(place / "cut-ddp"), "resume": True}], 29705)
    return place


def curve(adapter: Path) -> list[float]:
    return [entry[1] for entry in read_json(adapter / "train_report.json")["history"]]


@pytest.mark.parametrize("way", ["ddp", "shard"])
def test_two_processes_follow_the_curve_of_one(way: str, runs: Path) -> None:
    """Equal global batch: 2 sequences x 4 batches, and 2 x 2 x 2 processes."""
    assert curve(runs / way) == pytest.approx(curve(runs / "one"), abs=2e-5)
    one, two = read_tensors(runs / "one" / WEIGHTS), read_tensors(runs / way / WEIGHTS)
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=2e-3), name
    assert {file.name for file in (runs / way).iterdir()} == {file.name for file in (runs / "one").iterdir()}
    assert not (runs / f"{way}.work").exists()


@pytest.mark.parametrize(("whole", "cut"), [("shard", "cut"), ("ddp", "cut-ddp")])
def test_a_killed_run_resumes_to_the_same_bytes(whole: str, cut: str, runs: Path) -> None:
    report = read_json(runs / cut / "train_report.json")
    assert report["resumed_from"] == 3
    assert curve(runs / cut) == pytest.approx(curve(runs / whole), abs=1e-7)
    assert (runs / cut / WEIGHTS).read_bytes() == (runs / whole / WEIGHTS).read_bytes()


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29706")
ACCELERATE = (  # what it does on its own where there are several GPUs; with --cpu it starts one process, without MPI
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29707"),
)


def command(launcher: tuple[str, ...], base: Path, data: Path, out: Path, *more: str) -> None:
    """Run the command line's `train` by two processes of a launcher."""
    words = ["train", str(base), "--data", str(data), "--out", str(out), "--batch", "2", *more]
    for name, value in (SMALL | {"steps": 2}).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    entry = ["-m", "bitloft.cli"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *entry, *words], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("more", [(), pytest.param(("--shard",), marks=pytest.mark.slow)], ids=["ddp", "shard"])
def test_accelerate_launch_trains_the_adapter_of_torchrun(
    more: tuple[str, ...], base: Path, data: Path, tmp_path: Path
) -> None:
    command(TORCHRUN, base, data, tmp_path / "torchrun", *more)
    command(ACCELERATE, base, data, tmp_path / "accelerate", *more)
    assert (tmp_path / "accelerate" / WEIGHTS).read_bytes() == (tmp_path / "torchrun" / WEIGHTS).read_bytes()
    assert curve(tmp_path / "accelerate") == curve(tmp_path / "torchrun")
    assert len(curve(tmp_path / "accelerate")) == 2


# Each process: packed codes are shared out, put together for a forward that gives what one process gives, and come
# back whole from the state dict; scales stay whole in every process.
SURVIVE = """
import sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from bitloft.integrations import distributed
from bitloft.integrations.loading import load
from bitloft.integrations.peft import fresh_adapter
from bitloft.modules.linear import quant_linears
distributed.join()
model = load(sys.argv[1], arrange=False)
ids = torch.arange(2, 22).unsqueeze(0)
with torch.no_grad():
    wanted = model(ids).logits
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
adapted = fresh_adapter(model, rank=4, alpha=4).eval()
distributed.shard(adapted)
layers = quant_linears(adapted)
assert layers
for layer in layers.values():
    assert isinstance(layer.weight.data, DTensor), type(layer.weight.data)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.to_local().numel() * 2 == layer.weight.numel()
    assert not isinstance(layer.weight_scales, DTensor)
    assert layer.weight_scales.dtype == torch.int16
with torch.no_grad():
    assert torch.equal(adapted(input_ids=ids).logits, wanted)
stored = {n.replace("base_model.model.", "", 1).replace(".base_layer", ""): t for n, t in adapted.state_dict().items()}
for name, tensor in before.items():
    assert torch.equal(distributed.whole(stored[name]), tensor), name
distributed.wait()
"""


def test_packed_weights_survive_sharing_out(base: Path, tmp_path: Path) -> None:
    script = tmp_path / "survive.py"
    script.write_text(SURVIVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29704"]
    done = subprocess.run(
        [*command, str(script), str(base)], cwd=ROOT, capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_process_alone(base: Path, data: Path, tmp_path: Path) -> None:
    assert distributed.processes() == 1
    assert distributed.is_first()
    distributed.join()
    distributed.wait()
    with distributed.first_alone() as first:
        assert first
    tensor = torch.ones(3)
    assert distributed.whole(tensor) is not None
    assert distributed.like(tensor, tensor) is tensor
    with pytest.raises(OptionError, match="this is one alone; start it with torchrun"):
        train(base, data, tmp_path / "out", shard=True, batch=2, **SMALL)
    assert not (tmp_path / "out").exists()
