"""PEFT on a packed base: adapters to train, their files, and a LoRA layer that refuses what packed weights cannot do.

PEFT's default dispatch already adapts a QuantLinear, for it is an nn.Linear. ``QuantLora`` only replaces errors about
shapes deep inside by sentences: merging into packed codes would round the adapter away, and DoRA, PiSSA and their like
read a dense weight that does not exist. PEFT keeps custom layers per config object and does not save them, so
``register`` wraps ``LoraConfig.__post_init__`` once; without it everything but those sentences stays the same.

The start as an adapter (LoftQ as published): the layer's own start is switched off, A and B begin at A0 and B0, and
what is saved is the difference to the start, ``s*B*A - s0*B0*A0``, as one LoRA of rank at most 2r. So every adapter on
disk is relative to the base with its start. The alternative, saving A and B whole, compresses far worse.
"""

import copy
import warnings
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitloft.checkpoint import write_json, write_tensors
from bitloft.errors import AdapterError, OptionError
from bitloft.integrations.lora_layers import ExpertsLora, TableLora, refuse_variants
from bitloft.integrations.qalora import PooledVariant, is_pooled, merge_adapter
from bitloft.modules.embedding import QuantEmbedding
from bitloft.modules.experts import QuantExperts
from bitloft.modules.linear import QuantLinear, quant_linears

RECORD = "bitloft_adapter.json"
_PREFIX = "base_model.model."


class QuantLora(LoraLinear):
    """PEFT's LoRA layer over a QuantLinear: the same forward, and sentences where a dense weight would be needed."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Raises AdapterError for a LoRA variant that reads or changes the dense weight."""
        refuse_variants(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> PooledVariant | None:
        return PooledVariant() if config.use_qalora else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge pooled adapters (QA-LoRA) into the shifts. Raises AdapterError for any other kind."""
        chosen = check_adapters_to_merge(self, adapter_names)
        if not all(is_pooled(self, name) for name in chosen):
            raise AdapterError(
                f"an adapter cannot be merged into {self.get_base_layer().format} codes: rounding would lose it. Keep "
                "it beside the base, or pack it with `bitloft compress`; both are served without a merge."
            )
        for name in chosen:
            merge_adapter(self, name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if self.merged:
            raise AdapterError("a merge into packed shifts was rounded and cannot be undone; load the base again.")
        raise AdapterError("nothing is merged into a packed weight, so there is nothing to unmerge.")


def register() -> None:
    """Make every LoraConfig from now on put QuantLora over QuantLinear. Calling it again changes nothing."""
    original = LoraConfig.__post_init__
    if getattr(original, "knows_bitloft", False):
        return

    @wraps(original)
    def with_quant_lora(self: LoraConfig) -> None:
        original(self)
        self._register_custom_module({QuantLinear: QuantLora, QuantEmbedding: TableLora, QuantExperts: ExpertsLora})

    with_quant_lora.knows_bitloft = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = with_quant_lora


def fresh_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float | int,
    rslora: bool = False,
    dropout: float = 0.0,
    targets: tuple[str, ...] = (),
    seed: int = 0,
    pooled: int | None = None,
) -> PeftModel:
    """A trainable LoRA (B = 0) on the linears whose path, or its end after a dot, matches one of ``targets``.

    Without targets: all but the output head. ``alpha / rank`` (``alpha / sqrt(rank)`` with rslora) is the scaling.
    ``pooled``: QA-LoRA's, whose A reads sums over groups of so many inputs.
    Raises OptionError for a pattern that matches nothing and for a rank that a matrix cannot have.
    """
    register()
    names = _matching(_linears(model), targets)
    for name, module in names.items():
        if rank > min(module.in_features, module.out_features):
            shape = (module.out_features, module.in_features)
            raise OptionError(f"rank {rank} is larger than {name} of shape {shape} allows; use {min(shape)} or less.")
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain(alpha),
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=_short(model, set(names)),
        task_type=_task(model),
        **({} if pooled is None else {"use_qalora": True, "qalora_group_size": pooled}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _adapt(model, config)


def start_adapter(model: PreTrainedModel, *, dropout: float = 0.0) -> PeftModel:
    """The start of a base loaded with ``start="trainable"`` as a trainable LoRA: A = A0, B = B0, scaling s0.

    Raises AdapterError where the base has no start, still applies it, or has starts of several ranks.
    """
    register()
    started = {name: module for name, module in quant_linears(model).items() if module.rank}
    if not started:
        raise AdapterError("this base was quantized without a start (rank 0); train with start frozen.")
    kinds = {(module.rank, module.scaling) for module in started.values()}
    if len(kinds) > 1 or any(module.start_enabled for module in started.values()):
        raise AdapterError(
            "the start of this base cannot be trained: load it with start='trainable', one rank for all."
        )
    (rank, scaling) = kinds.pop()
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain(scaling * rank),
        lora_dropout=dropout,
        target_modules=_short(model, set(started)),
        task_type=_task(model),
    )
    adapted = _adapt(model, config)
    for layer in _lora_layers(adapted).values():
        base = layer.get_base_layer()
        layer.lora_A["default"].weight.data.copy_(base.start_a())
        layer.lora_B["default"].weight.data.copy_(base.start_b())
    return adapted


def _task(model: PreTrainedModel) -> str:
    """PEFT's name for what the model does: its causal class asks for a method that encoders do not have."""
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION"


def _adapt(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it is about to drop
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)


def _plain(alpha: float | int) -> float | int:
    """An integer where it is one: readers of adapter_config.json expect it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def _matching(linears: dict[str, nn.Linear], patterns: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears that any shell pattern matches, by path or by its end after a dot."""

    def matches(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")

    for pattern in patterns:
        if not any(matches(name, pattern) for name in linears):
            last = sorted({name.rpartition(".")[2] for name in linears})
            raise OptionError(f"target {pattern!r} matches no linear layer; this model has {', '.join(last)}.")
    return {n: m for n, m in linears.items() if not patterns or any(matches(n, p) for p in patterns)}


def _short(model: nn.Module, names: set[str]) -> list[str]:
    """Last names where they say it all (as PEFT writes ``all-linear``), else the full paths."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if meant == names else names)


def _lora_layers(model: PeftModel) -> dict[str, Any]:
    """The LoRA layers of an adapted model by the path of the layer they cover."""
    return {
        name.removeprefix(_PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def difference(
    a: Float[Tensor, "rank columns"],
    b: Float[Tensor, "rows rank"],
    scaling: float,
    a0: Float[Tensor, "rank0 columns"],
    b0: Float[Tensor, "rows rank0"],
    scaling0: float,
) -> tuple[Float[Tensor, "k columns"], Float[Tensor, "rows k"]]:
    """A, B with B @ A = scaling * b @ a - scaling0 * b0 @ a0, at its numerical rank k <= rank + rank0, balanced.

    Through QR of [b, -b0] and of [a; a0], so that the product is never formed; in float64, since the two terms cancel
    in most of what they hold.
    """
    left, middle_left = torch.linalg.qr(torch.cat([scaling * b.double(), -scaling0 * b0.double()], dim=1))
    right, middle_right = torch.linalg.qr(torch.cat([a.double(), a0.double()]).T)
    u, s, vt = torch.linalg.svd(middle_left @ middle_right.T)
    noise = 1e-13 * middle_left.norm() * middle_right.norm()  # what float64 leaves where the terms cancel
    k = int((s > torch.maximum(torch.finfo(torch.float32).eps * s[0], noise)).sum())
    root = s[:k].sqrt()
    return (root[:, None] * vt[:k] @ right.T).float(), ((left @ u[:, :k]) * root).float()


def save_adapter(model: PeftModel, directory: Path, *, base: str, record: dict[str, Any]) -> LoraConfig:
    """Write ``model``'s adapter as PEFT lays it out, with ``record`` in bitloft_adapter.json, into ``directory``.

    ``base`` becomes base_model_name_or_path. A trained start is written as its difference to the start. Returns the
    config as written. Raises AdapterError where a factor holds NaN or infinity.
    """
    config = copy.copy(model.peft_config["default"])
    if record["start"] == "trainable":
        tensors, rank = _difference_tensors(model)
        config.r, config.lora_alpha = rank, rank
    else:
        tensors = get_peft_model_state_dict(model)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} of the trained adapter holds NaN or infinity; lower the learning rate.")
    config.inference_mode, config.init_lora_weights, config.base_model_name_or_path = True, True, base
    config.save_pretrained(str(directory))
    whole = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_tensors(directory / "adapter_model.safetensors", whole, {"format": "pt"})
    write_json(directory / RECORD, {"schema": 1, **record})
    return config


def _difference_tensors(model: PeftModel) -> tuple[dict[str, Tensor], int]:
    """PEFT's tensors of the difference to the start, at one rank for all layers (the largest needed; zeros fill up)."""
    pairs = {}
    for name, layer in _lora_layers(model).items():
        base = layer.get_base_layer()
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        a0, b0 = base.start_a().to(a.device), base.start_b().to(a.device)
        pairs[name] = difference(a, b, layer.scaling["default"], a0, b0, base.scaling)
    rank = max(1, *(len(a) for a, _ in pairs.values()))
    tensors = {}
    for name, (a, b) in pairs.items():
        pad = rank - len(a)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, pad))
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, pad))
    return tensors, rank
