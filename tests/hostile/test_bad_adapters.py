"""Adapters that cannot be packed: one sentence each, nothing left at --out, not a byte of the source changed."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers import make_adapter

from bitloft.compress import compress
from bitloft.errors import AdapterError, BitloftError, OptionError

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        edit(found)
        save_file(found, directory / WEIGHTS)

    return change


def filled(side: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def edit(found: dict[str, torch.Tensor]) -> None:
        key = f"{KEY}.lora_{side}.weight"
        changed = found[key].clone()
        changed[0, 0] = value
        found[key] = changed.to(dtype)

    return tensors(edit)


def renamed(name: str) -> Callable[[Path], None]:
    def edit(found: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            found[f"base_model.model.{name}.lora_{side}.weight"] = found.pop(f"{KEY}.lora_{side}.weight")

    return tensors(edit)


def header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Rewrite the JSON header of the weight file as text."""

    def run(directory: Path) -> None:
        raw = (directory / WEIGHTS).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        made = change(raw[8 : 8 + size])
        (directory / WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + size :])

    return run


def truncated(directory: Path) -> None:
    raw = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def pickle_by_another_name(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def too_tall(directory: Path) -> None:
    config(rank_pattern={"0.self_attn.q_proj": 70})(directory)
    tall = {f"{KEY}.lora_A.weight": torch.ones(70, 64), f"{KEY}.lora_B.weight": torch.ones(64, 70)}
    tensors(lambda t: t.update(tall))(directory)


def cut_config(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{")


def named_twice(directory: Path) -> None:
    header(lambda h: h.replace(f'"{KEY}.lora_B.weight":'.encode(), TWICE))(directory)


TWICE = f'"{KEY}.lora_A.weight":'.encode()
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "rank zero": (config(r=0), "r of adapter .* is 0; a rank is an integer of at least 1"),
    "rank zero by pattern": (config(rank_pattern={"q_proj": 0}), "rank_pattern of 'q_proj' .* is 0"),
    "rank not a number": (config(r="8"), "is '8'; a rank is an integer"),
    "rank above the widths": (too_tall, r"rank 70 above min\(m, n\) = 64; retrain it"),
    "rank against the tensors": (config(r=7), "its config says rank 7"),
    "NaN": (filled("A", float("nan")), "holds NaN or infinity"),
    "infinity": (filled("B", float("inf")), "holds NaN or infinity"),
    "half-precision overflow": (filled("B", 1e6, torch.float16), "holds NaN or infinity"),
    "a product beyond float32": (tensors(lambda t: t.update({k: v * 1e25 for k, v in t.items()})), "beyond float32"),
    "alpha beyond float32": (config(lora_alpha=1e300), "lora_alpha of adapter .* positive finite number"),
    "a pickle": (pickled, "only as a pickle .adapter_model.bin., which can run code"),
    "a pickle named safetensors": (pickle_by_another_name, r"adapter_model\.safetensors"),
    "truncated weights": (truncated, r"adapter_model\.safetensors"),
    "truncated config": (cut_config, r"adapter_config\.json"),
    "dots in a name": (renamed("model..q_proj"), "is not a module path"),
    "a path in a name": (renamed("../../etc/q_proj"), "is not a module path"),
    "one module twice": (named_twice, "twice|not a valid|lacks"),
    "A without B": (tensors(lambda t: t.pop(f"{KEY}.lora_B.weight")), "lacks its lora_B.weight"),
    "no tensor": (tensors(lambda t: t.clear()), "holds no LoRA factors"),
    "integers": (tensors(lambda t: t.update({k: v.to(torch.int32) for k, v in t.items()})), "factors are floats"),
    "DoRA": (config(use_dora=True), "sets use_dora=True: DoRA's magnitudes"),
    "bias": (config(bias="all"), "bias='all'"),
    "a whole module": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "embeddings": (tensors(lambda t: t.update({"base_model.model.e.lora_embedding_A": torch.ones(2, 2)})), "embedding"),
    "another kind": (config(peft_type="IA3"), "peft_type 'IA3'"),
    "an unknown variant": (config(use_newlora=True), "use_newlora=True: bitloft does not know this variant"),
    "PiSSA": (config(init_lora_weights="pissa"), "rewrites the base"),
    "a pattern that is code": (config(rank_pattern={"(a+)+$": 2}), "regular expression that is not run"),
}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("method", ["waterfill", "loraquant"])
@pytest.mark.parametrize("case", BAD)
def test_a_sentence_and_nothing_else(case: str, method: str, tmp_path: Path) -> None:
    break_it, words = BAD[case]
    directory = make_adapter(tmp_path / "a", rank=4)
    break_it(directory)
    before = contents(directory)
    with pytest.raises(BitloftError, match=words) as caught:
        compress(directory, tmp_path / "p", method=method)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert contents(directory) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("method", ["waterfill", "loraquant", "rtn", "gptq", "truncate"])
def test_a_zero_b_is_packed_and_said(method: str, tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a", rank=4)
    tensors(lambda t: t.update({k: v * ("lora_A" in k) for k, v in t.items()}))(directory)
    settings: dict[str, Any] = {"bits": 8.0} if method == "waterfill" else {"method": method}
    report = compress(directory, tmp_path / "p", **settings)
    assert report.error == 0
    assert "changes nothing" in report.notes[0]


def test_one_zero_module_among_others_takes_no_bytes(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a", rank=4)
    tensors(lambda t: t.update({f"{KEY}.lora_B.weight": torch.zeros(64, 4)}))(directory)
    report = compress(directory, tmp_path / "p", bits=4.0)
    assert {m.name: m.widths for m in report.modules}["model.layers.0.self_attn.q_proj"] == {}


def test_a_record_that_names_another_base_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from bitloft.quantize import quantize

    quantize(tiny_model, tmp_path / "base", format="lm4:64", rank=2)
    directory = make_adapter(tmp_path / "a", rank=4)
    record = {"schema": 1, "base": "f" * 64, "source": "e" * 64, "start": "frozen"}
    (directory / "bitloft_adapter.json").write_text(json.dumps(record))
    before = contents(directory)
    with pytest.raises(AdapterError, match="was trained for another base"):
        compress(directory, tmp_path / "p", base=tmp_path / "base")
    assert contents(directory) == before
    assert not (tmp_path / "p").exists()


def test_a_budget_that_no_file_can_meet(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the least possible is"):
        compress(make_adapter(tmp_path / "a", rank=4), tmp_path / "p", bits=0.2)
