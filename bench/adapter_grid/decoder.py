"""SmolLM2 in the grid: its adapters are trained by the train verb and judged by the evaluate verb.

Judging is what the grid spends its hours on, so the base is opened once and its packed products are replaced by dense
ones in bfloat16 whose results go on in float32: twice as fast as float32 on a processor with bfloat16 arithmetic, and
equal to it within 1e-4 nats, since adapters, attention, norms and the output head stay in float32. (Autocast would
round the output before the adapter is added to it, and with it a part of the adapter.)
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapter_grid.plan import Setting
from adapter_grid.tasks import rows_of
from bitloft.evaluate import evaluate
from bitloft.integrations.loading import load, load_tokenizer
from bitloft.modules.linear import quant_linears, replace_module
from bitloft.tasks.lm import Collator, encode_rows
from bitloft.tasks.rows import read_rows
from bitloft.train import train

BATCH = {"xsum": 2, "reference": 2}  # long rows: as many tokens a step as four of the others
SAMPLE = 16  # training rows that the input moments are collected on


class HalfLinear(nn.Linear):
    """y = x W^T + bias with W and the product in bfloat16, y in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would draw a random weight
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        self.register_parameter("bias", bias)

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
        effort, shape = setting.effort, {"rank": setting.rank, "alpha": 2.0 * setting.rank}
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

    @torch.inference_mode()
    def moments(self, base: Path, setting: Setting) -> dict[str, Tensor]:
        """Second moments [in, in], mean of x x^T, of every packed module's inputs on the first training rows."""
        model, tokenizer = self.model(base), load_tokenizer(base)
        rows = read_rows(self.data(setting.task, "train"))[:SAMPLE]
        examples, _ = encode_rows(rows, tokenizer, setting.effort.length)
        found = Moments(model)
        for example in examples[:SAMPLE]:
            model(input_ids=Collator.for_tokenizer(tokenizer)([example])["input_ids"], use_cache=False)
        return found.done()

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


class Moments:
    """Sums of x x^T over the inputs of a model's dense linears. Modules that read the same tensor share one sum."""

    def __init__(self, model: nn.Module) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        linears = {name: m for name, m in model.named_modules() if type(m) is HalfLinear}
        self._hooks = [m.register_forward_pre_hook(self._hook(name)) for name, m in linears.items()]

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if self._last is None or self._last[0] is not x:
                rows = x.flatten(0, -2)
                self._last = x, rows.T @ rows
            self._sums[name] = self._sums[name] + self._last[1] if name in self._sums else self._last[1]
            self._count[name] = self._count.get(name, 0) + x.numel() // x.shape[-1]

        return see

    def done(self) -> dict[str, Tensor]:
        """The means; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        return {name: total / self._count[name] for name, total in self._sums.items()}
