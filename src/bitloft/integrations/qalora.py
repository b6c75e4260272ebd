"""QA-LoRA training through PEFT's own variant (``LoraConfig(use_qalora=True)``), which PEFT has for GPTQ layers only.

PEFT pools by mean and multiplies by the number of groups where the paper takes sums; the difference is a constant,
groups / group size, which merging accounts for, so an adapter means the same with PEFT alone and merged here.
"""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

from bitloft.errors import AdapterError
from bitloft.modules.linear import QuantLinear
from bitloft.modules.pooled import merge_qalora


class PooledVariant(QALoraLinearVariant):
    """PEFT's pooled LoRA on a QuantLinear whose groups it pools over."""

    @staticmethod
    def init(module: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Make A [rank, groups]. Raises AdapterError where the base's groups are not those of the config."""
        layer = module.get_base_layer()  # type: ignore[operator]
        size = config.qalora_group_size
        if not layer.format.shift or layer.format.group_size(layer.in_features) != size or layer.in_features % size:
            raise AdapterError(
                f"use_qalora with groups of {size} needs a base whose format has such groups and '+shift', in rows "
                f"that they divide; this layer is {layer.format} with rows of {layer.in_features}. Set "
                "qalora_group_size to the format's group, or quantize with a format such as uniform4:32+shift."
            )
        QALoraLinearVariant.init(module, adapter_name, config, **kwargs)
        if config.init_lora_weights:
            nn.init.kaiming_uniform_(module.lora_A[adapter_name].weight, a=5**0.5)  # type: ignore[index,union-attr]


def is_pooled(module: LoraLinear, adapter: str) -> bool:
    """True for an adapter that can merge into shifts."""
    return isinstance(module.lora_variant.get(adapter), PooledVariant)


def merge_adapter(module: LoraLinear, adapter: str) -> None:
    """Add a pooled adapter to the shifts of the layer below it."""
    layer: QuantLinear = module.get_base_layer()
    groups, size = layer.format.groups(layer.in_features), layer.format.group_size(layer.in_features)
    a, b = module.lora_A[adapter].weight.data, module.lora_B[adapter].weight.data
    merge_qalora(layer, a, b, module.scaling[adapter] * groups / size)
