"""LoRA on packed tables and packed experts; refusals of what needs a dense weight.

``TableLora`` is PEFT's embedding layer with sentences in place of errors from deep inside.

For a mixture PEFT's ``all-linear`` takes the experts in through ``ParamWrapper``, which adds ``B @ A`` to the dense
parameter while the module runs. On int8 codes that would be noise or nothing at all, without a word. ``ExpertsLora``
keeps PEFT's tensors, names and files (an adapter moves between the dense model and the packed one) and hands the
factors to QuantExperts instead, which applies them as x A^T B^T to the tokens of each expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from bitloft.errors import AdapterError
from bitloft.modules.experts import Delta, QuantExperts

_NO_MERGE = "an adapter cannot be merged into {}: rounding would lose it. Keep it beside the base."
INITS = (True, False, "gaussian")  # the ways to begin that do not read the weight


def refuse_variants(config: LoraConfig) -> None:
    """Raise AdapterError, by name, unless ``config`` is plain LoRA (rslora, patterns and biases too) or QA-LoRA."""
    found = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
    if config.init_lora_weights not in INITS:
        found.append(f"init_lora_weights={config.init_lora_weights!r}")
    if found:
        raise AdapterError(
            f"{found[0]} needs a dense weight and does not work on packed ones; use plain LoRA "
            "(init_lora_weights=True)."
        )


class TableLora(LoraEmbedding):
    """PEFT's LoRA layer over a QuantEmbedding."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Raises AdapterError for a LoRA variant that reads or changes the dense weight."""
        refuse_variants(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise AdapterError(_NO_MERGE.format("a packed table"))

    def unmerge(self) -> None:
        raise AdapterError("nothing is merged into a packed table, so there is nothing to unmerge.")


class ExpertsLora(ParamWrapper):
    """PEFT's wrapper of one projection of the experts; two projections are two wrappers, one around the other."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Raises AdapterError for a LoRA variant that reads or changes the dense weight."""
        refuse_variants(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def get_param(self) -> Tensor:
        """Shape and device of the dense parameter, without its memory: all that PEFT asks of it here."""
        experts: QuantExperts = self.get_base_layer()
        device = experts.get_parameter(self.parameter_name).device
        return torch.empty((), device=device).expand(experts.dense_shape(self.parameter_name))

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        experts: QuantExperts = self.get_base_layer()
        experts.deltas[self.parameter_name] = [self._delta(name) for name in active_adapters if name in self.lora_A]
        try:
            yield
        finally:
            del experts.deltas[self.parameter_name]

    def _delta(self, name: str) -> Delta:
        """A [experts, rank, in] and B [experts, out, rank] of one adapter, in PEFT's order of rows and columns."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        by_expert = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return Delta(a.reshape(self.num_experts, -1, a.shape[1]), by_expert, self.scaling[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise AdapterError(_NO_MERGE.format("packed experts"))

    def unmerge(self) -> None:
        raise AdapterError("nothing is merged into packed experts, so there is nothing to unmerge.")


# PEFT nests a second wrapper only over a module whose class has this very name
ExpertsLora.__name__ = ParamWrapper.__name__
