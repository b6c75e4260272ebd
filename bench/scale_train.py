"""Training by two processes (gloo, CPU) against one at equal global batch: the curve, and a second process's worth.

One process takes batches of 2 sequences, four to a step; two processes take 2 each, two to a step, as copies (DDP) and
sharing out base, adapter and optimizer (FSDP2). loss_difference is the largest difference of a logged loss to the one
process's; efficiency is its time a step over twice that of two (one thread each). All run `bitloft train` on a random
Llama of three layers, the first step left out of the times. Two processes need two idle cores.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch

from bitloft.footprint import random_llama
from bitloft.quantize import quantize

# hidden, intermediate, layers, vocabulary; tokens of a sequence, steps
SHAPES = {
    "full": ((576, 1536, 6, 8192), 256, 12),
    "quick": ((576, 1536, 3, 4096), 128, 8),
    "smoke": ((64, 128, 2, 256), 16, 2),
}
RUN = """
import json, sys, time, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from bitloft.integrations.distributed import is_first
from bitloft.train import train
base, data, jobs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for job in jobs:
    ticks = []
    report = train(base, data, job.pop("out"), progress=lambda *step: ticks.append(time.perf_counter()), **job)
    if is_first():
        print("RUN " + json.dumps({"losses": [e[1] for e in report.history], "ticks": ticks}), flush=True)
"""


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    arguments.threads = arguments.threads or 1
    harness.begin(arguments)
    shape, length, steps = SHAPES[arguments.mode]
    with tempfile.TemporaryDirectory() as place:
        base, data = prepared(Path(place), shape, length)
        shared: dict[str, Any] = {
            "steps": steps, "batch": 2, "length": length, "rank": 8, "lr": 1e-3, "dtype": "float32", "log_every": 1,
            "save_every": 0,
        }  # fmt: skip
        one = launched(Path(place), base, data, [shared | {"accumulate": 4, "out": f"{place}/one"}], 1)
        pair = [
            shared | {"accumulate": 2, "out": f"{place}/ddp"},
            shared | {"accumulate": 2, "out": f"{place}/fsdp", "shard": True},
        ]
        two = launched(Path(place), base, data, pair, 2)
    runs = {"one": one[0], "ddp": two[0], "fsdp2": two[1]}
    step = {name: seconds_of(run["ticks"]) for name, run in runs.items()}
    apart = {name: differing(run["losses"], runs["one"]["losses"]) for name, run in runs.items() if name != "one"}
    harness.table(
        ("run", "s a step", "last loss", "apart from one"),
        [(name, step[name], run["losses"][-1], apart.get(name, 0.0)) for name, run in runs.items()],
    )
    figures = {
        "loss_difference": round(max(apart.values()), 7),
        "efficiency_ddp": round(step["one"] / (2 * step["ddp"]), 4),
        "efficiency_fsdp2": round(step["one"] / (2 * step["fsdp2"]), 4),
        "seconds_per_step": {name: round(value, 4) for name, value in step.items()},
    }
    names = ("hidden", "intermediate", "layers", "vocabulary")
    asked = dict(zip(names, shape, strict=True)) | {"length": length, "steps": steps, "global_batch": 8}
    harness.finish("scale_train", arguments, asked, figures)
    return 0 if max(apart.values()) < 1e-3 else 1


def prepared(place: Path, shape: tuple[int, int, int, int], length: int) -> tuple[Path, Path]:
    """A packed base with a tokenizer of bytes, and text for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = random_llama(place / "model", *shape)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: shape[3]]
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=alphabet[0], pad_token=alphabet[0])
    tokenizer.save_pretrained(model)
    quantize(str(model), place / "base", format="lm2:64", rank=8)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (64, 2 * length), generator=generator).tolist()
    rows = [json.dumps({"text": "".join(map(chr, row))}) for row in letters]
    (place / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return place / "base", place / "rows.jsonl"


def launched(place: Path, base: Path, data: Path, jobs: list[dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """Run jobs under torchrun; what each printed."""
    script = place / "run.py"
    script.write_text(RUN)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*words, str(script), str(base), str(data), json.dumps(jobs)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"training ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("RUN ")]


def seconds_of(ticks: list[float]) -> float:
    """The median time between the ends of steps."""
    spent = sorted(b - a for a, b in itertools.pairwise(ticks))
    return spent[len(spent) // 2]


def differing(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
