"""integrations/lm_eval.py: without lm-eval a sentence; with it (tests/contract) its results."""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitloft.errors import OptionError
from bitloft.integrations.lm_eval import _numbers, harness


def test_without_lm_eval(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"install bitloft\[eval\]"):
        harness(AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model), ["piqa"])


def test_numbers_only() -> None:
    assert _numbers({"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A"}) == {"acc": 0.5}
