"""PEFT's adapter_config.json: every field honoured, known to be harmless, or refused by name.

The factor of a module is s = alpha / r (alpha / sqrt(r) with rsLoRA), alpha and r looked up in ``alpha_pattern`` and
``rank_pattern`` by PEFT's rule, ``re.match(r"(.*\\.)?(key)$", name)``. A key is code from a file: one that nests
quantifiers can run for hours. So only keys made of names, dots and an anchor are matched; any other is refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitloft.errors import AdapterError

# Fields that say how an adapter was made or placed; the tensors in its file say the same.
HARMLESS = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out"),
        *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
        *("qalora_group_size", "runtime_config"),
    )
)
HONOURED = frozenset(("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"))
# Fields with a sentence of their own; any other field that is set is refused by its name.
REASONS = {
    "use_dora": "DoRA's magnitudes are not part of a low-rank product",
    "lora_bias": "biases of the factors are not part of a low-rank product",
    "modules_to_save": "whole modules saved with the adapter are not low-rank",
    "trainable_token_indices": "trained embedding rows are not low-rank",
    "target_parameters": "adapters on bare parameters (fused experts) are not known here",
    "layer_replication": "it changes the model's layers",
    "use_qalora": "its inputs are pooled, so the product is not B @ A",
}
# Starts that rewrite the base: the saved factors then fit that rewritten base only.
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kept in a packed adapter: what readers of PEFT directories show or need.
KEPT = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "fan_in_fan_out")

_KEY = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.){1,400}")
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){0,40}")
NAME_LIMIT = 400
ALPHA_LIMIT = 1e30  # beyond it no product stays within float32


@dataclass(frozen=True)
class LoraRule:
    """Rank, alpha and their patterns, checked: gives the factor of a module."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def of(self, name: str) -> tuple[int, float]:
        """(rank, factor) of the module ``name``."""
        rank, alpha = self.ranks.get(_match(self.ranks, name), self.rank), self.alphas.get(_match(self.alphas, name))
        return rank, (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.rslora else rank)


def valid_name(name: object) -> bool:
    """True for a module path such as model.layers.0.self_attn.q_proj: no empty part, no ``..``, no separators."""
    return isinstance(name, str) and len(name) <= NAME_LIMIT and _NAME.fullmatch(name) is not None


def lora_rule(config: object, where: str) -> LoraRule:
    """Check a parsed adapter_config.json; ``where`` names the adapter in errors.

    Raises AdapterError naming the first field that is not LoRA as bitloft knows it.
    """
    if not isinstance(config, dict):
        raise AdapterError(f"adapter_config.json of {where} is {type(config).__name__}; it must be a JSON object.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"adapter {where} has peft_type {config.get('peft_type')!r}; only LORA can be read.")
    _refuse_variants(config, where)
    return LoraRule(
        _rank(config.get("r"), "r", where),
        _alpha(config.get("lora_alpha"), "lora_alpha", where),
        bool(config.get("use_rslora")),
        {k: _rank(v, f"rank_pattern of {k!r}", where) for k, v in _pattern(config, "rank_pattern", where).items()},
        {k: _alpha(v, f"alpha_pattern of {k!r}", where) for k, v in _pattern(config, "alpha_pattern", where).items()},
    )


def kept(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The part of a config that a packed adapter keeps; targets become full names unless they are plain ones."""
    targets = config.get("target_modules")
    narrowed = any(config.get(k) for k in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    plain = isinstance(targets, list) and bool(targets) and all(valid_name(t) for t in targets) and not narrowed
    found = {key: config[key] for key in KEPT if config.get(key) is not None}
    return found | {"bias": "none", "target_modules": sorted(targets) if plain and targets else names}


def _refuse_variants(config: Mapping[str, Any], where: str) -> None:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REWRITING):
        raise AdapterError(
            f"adapter {where} was started with init_lora_weights={start!r}, which rewrites the base it fits; convert "
            "it to a plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter {where} has bias={config['bias']!r}; only adapters with bias='none' can be read.")
    for field in sorted(set(config) - HARMLESS - HONOURED):
        if config[field]:
            reason = REASONS.get(field, "bitloft does not know this variant")
            raise AdapterError(f"adapter {where} sets {field}={_short(config[field])}: {reason}, so it is refused.")


def _pattern(config: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{field} of adapter {where} is {_short(pattern)}; it must map module names to numbers.")
    for key in pattern:
        if not _KEY.fullmatch(key):
            raise AdapterError(
                f"{field} of adapter {where} has the key {_short(key)}, a regular expression that is not run; "
                "write module names or their endings."
            )
    return pattern


def _match(pattern: Mapping[str, Any], name: str) -> str:
    """The first key that matches ``name`` by PEFT's rule, or ``name``."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), name)


def _rank(value: object, field: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{field} of adapter {where} is {_short(value)}; a rank is an integer of at least 1.")
    return value


def _alpha(value: object, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= ALPHA_LIMIT:
        raise AdapterError(f"{field} of adapter {where} is {_short(value)}; it must be a positive finite number.")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
