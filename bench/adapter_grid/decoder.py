"""SmolLM2 in the grid: its adapters are trained by the train verb and judged by the evaluate verb.

Judging is what the grid spends its hours on, so the base is opened once and its packed products are replaced by dense
ones in bfloat16 whose results go on in float32: twice as fast as float32 on a processor with bfloat16 arithmetic, and
equal to it within 2e-4 nats on GSM8K, since adapters, attention, norms and the output head stay in float32. (Autocast
would round the output before the adapter is added to it, and with it a part of the adapter.)
"""

import json
from pathlib import Path
from typing import Any

from base_grid.plan import SHARED
from base_grid.tasks import text_files
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapter_grid.plan import REFINED, Setting
from adapter_grid.tasks import rows_of
from bitloft.evaluate import evaluate
from bitloft.integrations.loading import load
from bitloft.modules.linear import quant_linears, replace_module
from bitloft.sensitivity import Moments, second_moments
from bitloft.train import train

BATCH = {"xsum": 2, "reference": 2}  # long rows: as many tokens a step as four of the others


class HalfLinear(nn.Linear):
    """y = x W^T + bias with W and the product in bfloat16, y in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would draw a random weight
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        y = nn.functional.linear(input.bfloat16(), self.weight).float()
        return y if self.bias is None else y + self.bias


class Decoder:
    """Training, judging and input moments of one causal language model's bases; the last base is kept in memory."""

    def __init__(self, directory: Path, shared: Path, model: Path) -> None:
        self.directory, self.shared, self._source = directory, shared, model
        self._opened: tuple[Path, PreTrainedModel] | None = None

    def source(self, task: str) -> Path:
        return self._source

    def train(self, base: Path, setting: Setting, out: Path) -> None:
        effort = setting.effort
        shape: dict[str, Any] = {"rank": setting.rank, "alpha": 2.0 * setting.rank}
        train(
            base,
            self.data(setting.task, "train"),
            out,
            start=setting.start,
            steps=effort.steps,
            lr=effort.learning_rate,
            length=effort.length,
            batch=BATCH.get(setting.task, 4),
            seed=setting.seed,
            save_every=10,
            resume=True,
            **(shape if setting.start == "frozen" else {}),
        )

    def loss(self, base: Path, setting: Setting, adapter: Path | None) -> dict[str, Any]:
        """Mean loss of the held-out rows in nats a token, and its standard error over rows."""
        effort, data = setting.effort, self.data(setting.task, "judge")
        report = evaluate(self.model(base), data, adapter, limit=effort.rows, length=effort.length)
        return {"loss": round(report.loss, 6), "stderr": report.stderr, "tokens": report.tokens}

    def moments(self, base: Path, setting: Setting) -> Moments:
        """The metric of the base on the first training rows."""
        return second_moments(self.model(base), self.data(setting.task, "train"), length=setting.effort.length)

    def base_settings(self, base: str, rank: int) -> dict[str, Any]:
        """What quantize is asked for; a refined base is the row "+refine" of bench/quality_base.py, on WikiText-2."""
        if not base.endswith(REFINED):
            return {"format": base, "rank": rank}
        text = text_files(self.directory, self.shared)["wikitext2"]["train"]
        return SHARED | {"format": base.removesuffix(REFINED), "calibrate": str(text)}

    def model(self, base: Path) -> PreTrainedModel:
        if self._opened is None or self._opened[0] != base:
            model = load(base)
            for name, layer in quant_linears(model).items():
                replace_module(model, name, HalfLinear(layer.dense(), layer.bias))
            self._opened = base, model
        return self._opened[1]

    def data(self, task: str, which: str) -> Path:
        file = self.directory / "data" / f"{task}.{which}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            for name, rows in zip(("train", "judge"), rows_of(task, self.shared), strict=True):
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (file.parent / f"{task}.{name}.jsonl").write_text(text, encoding="utf-8")
        return file
