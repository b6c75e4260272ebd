"""adapter_config.json: scaling rules, pattern keys, and every field that is refused."""

import math
import time
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from bitloft.adapter_config import kept, lora_rule, valid_name
from bitloft.errors import AdapterError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]}


def test_every_field_of_a_default_peft_config_is_known() -> None:
    config = LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=8).to_dict()
    config["peft_type"] = "LORA"
    config["target_modules"] = ["q_proj"]
    assert lora_rule(config, "x").of("q_proj") == (4, 2.0)


def test_factors_follow_alpha_and_rank() -> None:
    assert lora_rule(PLAIN, "x").of("m.q_proj") == (8, 2.0)
    assert lora_rule(PLAIN | {"use_rslora": True}, "x").of("m.q_proj") == (8, 16 / math.sqrt(8))
    patterns = {"rank_pattern": {"0.q_proj": 2}, "alpha_pattern": {"q_proj": 4.0}}
    rule = lora_rule(PLAIN | patterns, "x")
    assert rule.of("m.0.q_proj") == (2, 2.0)
    assert rule.of("m.1.q_proj") == (8, 0.5)
    assert rule.of("m.0.v_proj") == (8, 2.0)


@pytest.mark.parametrize("key", ["q_proj", "0.q_proj", r"layers\.0\.q_proj", "^model.layers.0.q_proj", "proj", "a-b"])
@pytest.mark.parametrize("name", ["model.layers.0.q_proj", "x.model.layers.0.q_proj", "q_proj", "m.q_proj2", "a-b"])
def test_pattern_keys_match_as_peft_matches_them(key: str, name: str) -> None:
    rule = lora_rule(PLAIN | {"rank_pattern": {key: 3}}, "x")
    assert (rule.of(name)[0] == 3) == (get_pattern_key([key], name) == key)


@pytest.mark.parametrize("key", [r"(([a-z_.0-9]+)+)+X", ".*q_proj", "q|v", "", "x" * 500, "a\nb"])
def test_regular_expressions_are_not_run(key: str) -> None:
    began = time.perf_counter()
    with pytest.raises(AdapterError, match="regular expression that is not run"):
        lora_rule(PLAIN | {"alpha_pattern": {key: 1}}, "x")
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA"),
        ({"use_dora": True}, "use_dora=True: DoRA's magnitudes"),
        ({"bias": "all"}, "bias='all'; only adapters with bias='none'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: whole modules"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.*embedding rows"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*does not know this variant"),
        ({"brand_new": {"x": 1}}, "brand_new=.*does not know this variant"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which rewrites the base"),
        ({"init_lora_weights": "loftq"}, "rewrites the base"),
        ({"r": 0}, "r of adapter x is 0; a rank is an integer"),
        ({"r": True}, "r of adapter x is True"),
        ({"r": "8"}, "r of adapter x is '8'"),
        ({"r": None}, "r of adapter x is None"),
        ({"lora_alpha": math.nan}, "lora_alpha of adapter x is nan; it must be a positive"),
        ({"lora_alpha": -1}, "lora_alpha of adapter x is -1"),
        ({"lora_alpha": 10**400}, "lora_alpha of adapter x is 1000"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern of 'q' of adapter x is 1.5"),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern of 'q' of adapter x is 0"),
        ({"rank_pattern": ["q"]}, "rank_pattern of adapter x is .*must map"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        lora_rule(PLAIN | change, "x")


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(AdapterError, match="is list; it must be a JSON object"):
        lora_rule([], "x")


def test_harmless_fields_pass_and_the_needed_ones_are_kept() -> None:
    config = PLAIN | {"lora_dropout": 0.1, "exclude_modules": None, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    lora_rule(config, "x")
    small = kept(config, ["m.q_proj"])
    assert small["target_modules"] == ["q_proj"]
    assert small["fan_in_fan_out"] is True
    assert "lora_dropout" not in small


@pytest.mark.parametrize(
    "change", [{"target_modules": ".*q"}, {"layers_to_transform": [0]}, {"target_modules": ["a|b"]}]
)
def test_targets_that_need_more_than_names_become_full_names(change: dict[str, Any]) -> None:
    assert kept(PLAIN | change, ["m.0.q_proj"])["target_modules"] == ["m.0.q_proj"]


@pytest.mark.parametrize("name", ["", "a..b", "../a", "a/b", "a b", ".a", "a.", "a\n", 3, None, "x" * 401, "ä"])
def test_names_that_are_not_module_paths(name: object) -> None:
    assert not valid_name(name)


def test_module_paths_are_valid() -> None:
    assert valid_name("model.layers.0.self_attn.q_proj")
