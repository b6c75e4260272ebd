"""The same requests through PEFT: its generate with adapter_names, in batches of 32 rows in order of arrival.

The base is the model in float32 (bfloat16 is slower on processors without bfloat16 products), the adapters are the
packed ones' values, in PEFT's own layers. All answers have one length, so that no row waits for a longer one.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bitloft.adapters import read_packed
from bitloft.kernels.ops import decode

ROWS = 32


class Peer:
    """PEFT with the adapters of some requests in memory; the first of them have been answered once."""

    def __init__(self, source: Path, pool: Sequence[Path], jobs: Sequence[tuple[int, list[int]]], answer: int) -> None:
        used = sorted({adapter for adapter, _ in jobs})
        self.answer = answer
        self.model = _model(source, {f"a{i}": pool[i] for i in used})
        self.batches = [jobs[at : at + ROWS] for at in range(0, len(jobs), ROWS)]
        self.about = {"requests": len(jobs), "adapters": len(used), "rows": ROWS, "dtype": "float32"}
        _generate(self.model, self.batches[0][:2], 2)

    def seconds(self) -> float:
        """What all requests take."""
        began = time.perf_counter()
        for batch in self.batches:
            _generate(self.model, batch, self.answer)
        return time.perf_counter() - began


def _model(source: Path, adapters: dict[str, Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    read = {name: read_packed(path) for name, path in adapters.items()}
    ranks = {
        m: max(sum(b.a.shape[0] for b in a.modules[m].blocks) for a in read.values())
        for a in read.values()
        for m in a.modules
    }
    rank = max(max(ranks.values()), 1)
    targets = sorted({name.rsplit(".", 1)[1] for name in ranks})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    wrapped: Any = get_peft_model(model, config, adapter_name=next(iter(read)))
    for name in list(read)[1:]:
        wrapped.add_adapter(name, config)
    for name, adapter in read.items():
        for path, module in adapter.modules.items():
            layer = wrapped.base_model.model.get_submodule(path)
            a, b = layer.lora_A[name].weight.data.zero_(), layer.lora_B[name].weight.data.zero_()
            at = 0
            for block in module.blocks:
                count = block.a.shape[0]
                a[at : at + count], b[:, at : at + count], at = decode(block.a), decode(block.bt).T, at + count
        adapter.modules.release()  # type: ignore[attr-defined]
    return wrapped.eval()


@torch.no_grad()
def _generate(model: Any, batch: Sequence[tuple[int, list[int]]], answer: int) -> None:
    longest = max(len(prompt) for _, prompt in batch)
    ids = torch.tensor([[0] * (longest - len(p)) + p for _, p in batch])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for _, p in batch])
    model.generate(
        input_ids=ids, attention_mask=mask, adapter_names=[f"a{i}" for i, _ in batch], max_new_tokens=answer,
        min_new_tokens=answer, do_sample=False, pad_token_id=0,
    )  # fmt: skip
