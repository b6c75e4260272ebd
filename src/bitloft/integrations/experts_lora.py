"""LoRA on packed experts, as PEFT lays it out for fused 3-D parameters (``target_parameters``).

For a mixture PEFT's ``all-linear`` takes the experts in through ``ParamWrapper``, which adds ``B @ A`` to the dense
parameter while the module runs. On int8 codes that would be noise or nothing at all, without a word. ``ExpertsLora``
keeps PEFT's tensors, names and files (an adapter moves between the dense model and the packed one) and hands the
factors to QuantExperts instead, which applies them as x A^T B^T to the tokens of each expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from bitloft.errors import AdapterError
from bitloft.modules.experts import Delta, QuantExperts

_INITS = (True, False, "gaussian")  # the ways to begin that do not read the weight


class ExpertsLora(ParamWrapper):
    """PEFT's wrapper of one projection of the experts; two projections are two wrappers, one around the other."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Raises AdapterError for a beginning that reads the dense weight."""
        if config.init_lora_weights not in _INITS:
            raise AdapterError(
                f"init_lora_weights={config.init_lora_weights!r} needs a dense weight and does not work on packed "
                "experts; use plain LoRA (init_lora_weights=True)."
            )
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
        raise AdapterError(
            "an adapter cannot be merged into packed experts: rounding would lose it. Keep it beside the base."
        )

    def unmerge(self) -> None:
        raise AdapterError("nothing is merged into packed experts, so there is nothing to unmerge.")


# PEFT nests a second wrapper only over a module whose class has this very name
ExpertsLora.__name__ = ParamWrapper.__name__
