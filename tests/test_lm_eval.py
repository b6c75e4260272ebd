"""integrations/lm_eval.py: without lm-eval a sentence; with it (tests/contract) its results."""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitloft.errors import DataError, OptionError
from bitloft.integrations.lm_eval import _figures, _numbers, harness


def test_without_lm_eval(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"install bitloft\[eval\]"):
        harness(AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model), ["piqa"])


def test_numbers_only() -> None:
    assert _numbers({"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A"}) == {"acc": 0.5}


def test_a_metric_behind_two_filters_is_two_numbers() -> None:
    both = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    assert _numbers(both) == both


def test_a_task_without_a_metric_is_no_result() -> None:
    grouped = {"results": {"all": {"alias": "all"}, "one": {"acc,none": 1.0}}, "group_subtasks": {"all": ["one"]}}
    assert _figures(grouped) == {"all": {}, "one": {"acc": 1.0}}
    with pytest.raises(DataError, match="measured nothing of one; its metric_list names no metric that lm-eval has"):
        _figures({"results": {"one": {"alias": "one", "sample_len": 0}}, "group_subtasks": {"one": []}})
