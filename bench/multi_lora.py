"""32 rows of 32 adapters at once: against 32 rows of one adapter, against PEFT, and against dense 16-bit factors.

Adapters of rank 16 at a layer of 2048 x 2048, their widths drawn from those of a real adapter (multi_lora_widths.json):
water-filling at 0.5 and 0.8 true bits, LoRAQuant at its own. Of the three the worst counts.

mixed_vs_one_adapter  a packed layer (lm2:64, a start of rank 16) with 32 adapters in the batch / all rows on one of
                      them; ``deltas`` beside it is the same without the base, where nothing hides the difference
vs_peft_adapter_names the same layer / PEFT's layer with adapter_names, in float32 or bfloat16, whichever is faster
vs_fp16_same_shape    the deltas alone / torch.bmm over the gathered dense factors, in the fastest dtype

Pairs are interleaved; a figure is the ratio of two medians.
"""

import contextvars
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bitloft.adapters import PackedAdapter, PackedBlock, PackedModule
from bitloft.formats import Format
from bitloft.kernels.lora import values
from bitloft.kernels.ops import encode
from bitloft.modules.linear import QuantLinear
from bitloft.modules.multi import AdapterBank
from bitloft.solvers.base import Solution, Start

WIDTHS = Path(__file__).with_name("multi_lora_widths.json")
MODES = {"full": (2048, 400), "quick": (2048, 150), "smoke": (64, 3)}  # width, pairs
ROWS, RANK = 32, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMITS = {"mixed_vs_one_adapter": 1.25, "vs_peft_adapter_names": 0.2, "vs_fp16_same_shape": 1.0}


def main() -> int:
    given = harness.parser(__doc__).parse_args()
    harness.begin(given)
    torch.manual_seed(0)
    width, pairs = MODES[given.mode]
    histograms = json.loads(WIDTHS.read_text(encoding="utf-8"))
    kinds = {name: measured(histogram, width, pairs) for name, histogram in histograms.items() if name != "source"}
    columns = ["kind", *next(iter(kinds.values()))]
    harness.table(columns, [[name, *(row[column] for column in columns[1:])] for name, row in kinds.items()])
    worst = {name: max(row[name] for row in kinds.values()) for name in LIMITS}
    shape = {"rows": ROWS, "adapters": ROWS, "rank": RANK, "features": [width, width], "pairs": pairs}
    harness.finish("multi_lora", given, shape, {**worst, "limits": LIMITS, "kinds": kinds})
    return int(given.mode != "smoke" and any(worst[name] > limit for name, limit in LIMITS.items()))


@torch.no_grad()
def measured(histogram: Mapping[str, int], width: int, pairs: int) -> dict[str, float]:
    """All figures of one kind of adapter."""
    adapters = {f"a{i}": drawn(histogram, width, random.Random(i)) for i in range(ROWS)}
    layer = nn.ModuleDict({"packed": packed_layer(width)}).eval()
    bank = AdapterBank(layer)
    for name, adapter in adapters.items():
        bank.attach(name, adapter)
    x = torch.randn(ROWS, width).bfloat16()
    names = list(adapters)

    def of(call: Callable[[Tensor], Any], rows: list[str]) -> Callable[[], Any]:
        """A call with adapters chosen, as every layer of a model finds them; choosing is once a step."""
        context, chosen = contextvars.copy_context(), bank.rows(rows)
        context.run(chosen.__enter__)
        ends.append(lambda: context.run(chosen.__exit__, None, None, None))
        return lambda: context.run(call, x)

    ends: list[Callable[[], Any]] = []
    packed: Any = layer["packed"]
    mixed, one = medians(of(packed, names), of(packed, names[:1] * ROWS), pairs)
    alone, alone_one = medians(of(packed.deltas, names), of(packed.deltas, names[:1] * ROWS), pairs)
    theirs = [medians(of(packed, names), peft_layer(adapters, x.to(d), width), pairs // 4 + 1) for d in DTYPES[:2]]
    dense = [medians(of(packed.deltas, names), gathered(adapters, x.to(d)), pairs // 2 + 1) for d in DTYPES]
    for end in ends:
        end()
    weights = sum(p.nbytes for a in adapters.values() for b in a.modules["packed"].blocks for p in (b.a, b.bt))
    return {
        "components": sum(b.a.shape[0] for a in adapters.values() for b in a.modules["packed"].blocks) / ROWS,
        "kilobytes": weights / 1e3,
        "layer_us": 1e6 * mixed,
        "deltas_us": 1e6 * alone,
        "peft_us": 1e6 * min(peft for _, peft in theirs),
        "bmm_us": 1e6 * min(bmm for _, bmm in dense),
        "mixed_vs_one_adapter": mixed / one,
        "deltas_mixed_vs_one_adapter": alone / alone_one,
        "vs_peft_adapter_names": max(ours / peft for ours, peft in theirs),
        "vs_fp16_same_shape": max(ours / bmm for ours, bmm in dense),
    }


def drawn(histogram: Mapping[str, int], width: int, generator: random.Random) -> PackedAdapter:
    """An adapter whose components have the formats of a real one's, in blocks as the packer makes them."""
    kinds = generator.choices(list(histogram), list(histogram.values()), k=RANK)
    blocks = []
    for kind in sorted({kind for kind in kinds if kind}):
        count = kinds.count(kind)
        a, bt = (encode(torch.randn(count, width) * 0.02, fmt) for fmt in kind.split())
        blocks.append(PackedBlock(a, bt))
    module = PackedModule("packed", width, width, tuple(blocks))
    return PackedAdapter(Path("."), {}, {"packed": module}, None, None, torch.zeros(0, dtype=torch.uint8), 0.0, 0.0, "")


def packed_layer(width: int) -> QuantLinear:
    a0, b0 = (encode(torch.randn(RANK, width) * 0.02, "lm4:64") for _ in range(2))
    fmt = Format.parse("lm2:64")
    layer = QuantLinear(width, width, fmt, rank=RANK, scaling=1.0, start_format=Format.parse("lm4:64"))
    layer.load_solution(Solution(encode(torch.randn(width, width) * 0.02, fmt), Start(a0, b0, 1.0), 0.0, 0.0))
    layer.arrange()
    return layer


def factors(adapter: PackedAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Dense A [16, in] and B^T [16, out]: what the components stand for, zeros for those that were dropped."""
    blocks = adapter.modules["packed"].blocks
    width = adapter.modules["packed"].in_features
    found = [torch.cat([torch.zeros(0, width), *(values(getattr(b, side)) for b in blocks)]) for side in ("a", "bt")]
    a, bt = (nn.functional.pad(side, (0, 0, 0, RANK - side.shape[0])).to(dtype) for side in found)
    return a, bt


def peft_layer(adapters: Mapping[str, PackedAdapter], x: Tensor, width: int) -> Callable[[], Any]:
    """PEFT's linear with every adapter loaded, one name for each row."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["packed"])
    holder = nn.ModuleDict({"packed": nn.Linear(width, width, bias=False)})
    model = get_peft_model(holder, config, adapter_name=next(iter(adapters)))
    for name in list(adapters)[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model["packed"]
    for name, adapter in adapters.items():
        a, bt = factors(adapter, x.dtype)
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a, bt.T.contiguous()
    layer.to(x.dtype).eval()
    names = list(adapters)
    return lambda: layer(x, adapter_names=names)


def gathered(adapters: Mapping[str, PackedAdapter], x: Tensor) -> Callable[[], Any]:
    """The deltas by torch.bmm over all adapters' dense factors, one batch element a row."""
    pairs = [factors(adapter, x.dtype) for adapter in adapters.values()]
    a, bt = torch.stack([pair[0].T.contiguous() for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    return lambda: torch.bmm(torch.bmm(x.unsqueeze(1), a), bt).squeeze(1)


def medians(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> tuple[float, float]:
    """Median seconds of two runs, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs + 3):
        for run, found in zip((first, second), times, strict=True):
            began = time.perf_counter()
            run()
            if i >= 3:  # the first ones pay for what is kept
                found.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    sys.exit(main())
