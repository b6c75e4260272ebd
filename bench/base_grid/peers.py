"""Bases by other people's software, each in an environment of its own: BITLOFT_AUTOROUND names a Python that has it.

AutoRound (Intel, 0.16.1 when this was written) gets our calibration text in sequences of 512 tokens and 200 iterations;
what it leaves is a dense model that lies on its grid, which a LoRA is trained on like on any other. GPTQModel (7.7.0)
comes as source only; building it was not tried, so it is not part of the grid.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

ITERATIONS, LENGTH, GROUP = 200, 512, 64
SCRIPT = """
import sys
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

model, out, bits, text, samples, iterations, length, group = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
ids = tokenizer(open(text, encoding="utf-8").read(), return_tensors="pt").input_ids[0]
length, samples = int(length), int(samples)
count = len(ids) // length
rows = [ids[i * count // samples * length :][:length] for i in range(samples)]
batches = [{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones(1, length)} for row in rows]
made = AutoRound(loaded, tokenizer, bits=int(bits), group_size=int(group), sym=False, dataset=batches,
                 iters=int(iterations), seqlen=length, nsamples=samples, batch_size=4, device_map="cpu")
model, _ = made.quantize()
model.float().save_pretrained(out)  # its own "fake" format restores the values from before
tokenizer.save_pretrained(out)
"""


def available(maker: str) -> bool:
    """Whether the peer's environment is named."""
    return bool(os.environ.get(_variable(maker)))


def make_peer(maker: str, model: Path, out: Path, bits: int, text: Path, samples: int) -> dict[str, Any]:
    """Quantize by a peer into ``out``; its true bits: codes, and per group an fp16 scale and a zero point."""
    work = out.with_name(out.name + ".work")
    given = (model, work, bits, text, samples, ITERATIONS, LENGTH, GROUP)
    subprocess.run([os.environ[_variable(maker)], "-c", SCRIPT, *map(str, given)], check=True)
    work.rename(out)
    true_bits = bits + (16 + bits) / GROUP
    return {"true_bits": true_bits, "true_bits_with_start": true_bits}


def _variable(maker: str) -> str:
    return f"BITLOFT_{maker.upper()}"
