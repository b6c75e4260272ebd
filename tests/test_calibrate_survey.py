"""The survey of a model: the moments of its own inputs, one block in memory at a time."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitloft.calibrate.run import Known
from bitloft.calibrate.survey import survey
from bitloft.integrations.body import Body
from bitloft.integrations.source import open_source
from bitloft.options import QuantizeOptions
from tests.helpers import WORDS

NAMES = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


def test_moments_are_those_of_the_model_itself(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    text, most = tmp_path / "t.txt", [0]
    text.write_text(" ".join([WORDS] * 20), encoding="utf-8")
    usual = Body.fill

    def fill(self: Body, names: Any) -> None:
        usual(self, names)
        blocks = {n.split(".")[2] for n, p in self.model.named_parameters() if ".layers." in n and not p.is_meta}
        most[0] = max(most[0], len(blocks))

    monkeypatch.setattr(Body, "fill", fill)
    found: dict[str, torch.Tensor] = {}

    def each(names: list[str], known: Known) -> None:
        found.update({name: known.get(name).moment for name in names})

    options = QuantizeOptions(solver="calibrated", calibrate=str(text), samples=6, calibrate_length=16)
    survey(open_source(str(tiny_model)), options, dict.fromkeys(NAMES, "linear"), each)
    assert list(found) == NAMES
    assert most[0] == 1
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    inputs: dict[str, torch.Tensor] = {}
    for name in NAMES:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, n=name: inputs.__setitem__(n, a[0].flatten(0, 1))
        )
    ids = AutoTokenizer.from_pretrained(tiny_model)(text.read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        model(torch.stack([rows[i * len(rows) // 6] for i in range(6)]))
    for name, x in inputs.items():
        assert torch.allclose(found[name], x.T @ x / len(x), rtol=1e-3, atol=1e-4)
