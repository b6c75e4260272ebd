"""transformers: a quantization method named ``bitloft``, so that any Auto class reads, makes and saves our bases.

The config lists every packed module with its format, so loading never guesses: the skeleton is built from that map on
the meta device, then tensors load by name. Quantizing on load goes through the same ``solve`` as the quantize verb.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitloft import __version__
from bitloft.errors import CheckpointError
from bitloft.formats import Format
from bitloft.integrations.loading import base_record, load, load_tokenizer
from bitloft.modules.linear import QuantLinear, quant_linears, replace_module
from bitloft.modules.select import Selection, select_linears
from bitloft.options import QuantizeOptions
from bitloft.solvers import Solution, solve

__all__ = ["BitloftConfig", "BitloftQuantizer", "base_record", "load", "load_tokenizer", "register"]

METHOD = "bitloft"
SCHEMA = 1


class BitloftConfig(QuantizationConfigMixin):
    """``quantization_config`` of a bitloft base: how it was quantized, and ``modules``: path -> format of each layer.

    Without ``modules`` (quantize on load) the options choose them. Unknown options raise TypeError; another schema
    raises CheckpointError.
    """

    def __init__(
        self,
        options: QuantizeOptions | Mapping[str, Any] | None = None,
        *,
        modules: Mapping[str, str] | None = None,
        schema: int = SCHEMA,
        bitloft_version: str = __version__,
        quant_method: str = METHOD,
        **kwargs: Any,
    ) -> None:
        if schema != SCHEMA:
            raise CheckpointError(f"this base has schema {schema}; bitloft {__version__} reads schema {SCHEMA}.")
        known = {f.name for f in fields(QuantizeOptions)}
        given = dict(asdict(options) if isinstance(options, QuantizeOptions) else options or {}) | kwargs
        unknown = set(given) - known
        if unknown:
            raise CheckpointError(f"quantization_config holds the unknown option {sorted(unknown)[0]!r}.")
        self.quant_method = METHOD
        self.bitloft_version = bitloft_version
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        self.options = QuantizeOptions(**chosen)
        self.modules = None if modules is None else dict(modules)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "schema": SCHEMA,
            "bitloft_version": self.bitloft_version,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.options).items()},
            "modules": self.modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class BitloftQuantizer(HfQuantizer):
    """Builds the skeleton, quantizes on load, saves. ``solutions`` holds the errors found while quantizing on load."""

    requires_calibration = False
    quantization_config: BitloftConfig

    def __init__(self, quantization_config: BitloftConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.errors: dict[str, tuple[float, float]] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.modules is None:
            config.modules = dict.fromkeys(choose(model, config.options).chosen, config.options.format)
        for name, spelling in config.modules.items():
            local = _local_name(model, name)
            if local is not None:
                _make_skeleton(model, local, spelling, config.options)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and isinstance(model.get_submodule(module), QuantLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        return Format.parse(self.quantization_config.options.format).bits / 8

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in quant_linears(model).items():
            with torch.device("meta"):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight = nn.Parameter(layer.dense().to(dtype or torch.float32))
            dense.bias = layer.bias
            replace_module(model, name, dense)
        return model


class _Quantize(ConversionOps):
    """Turns one dense weight, as it is read, into the parts of its QuantLinear."""

    def __init__(self, quantizer: BitloftQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module | None = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        if model is None:
            raise CheckpointError("transformers gave no model to quantize into; this transformers version is unknown.")
        result: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            weight = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name)
            if not isinstance(layer, QuantLinear):
                raise CheckpointError(f"{name} was chosen for quantization but is a {type(layer).__name__}.")
            solution = solve(name, weight, self.quantizer.quantization_config.options)
            self.quantizer.errors[name] = (solution.error_before, solution.error_after)
            parts = {f"{name}.{part}": tensor for part, tensor in layer.tensors_of(solution).items()}
            for part in parts if missing_keys is not None else ():
                missing_keys.discard(part)
            result |= parts
        return result


def choose(model: PreTrainedModel, options: QuantizeOptions) -> Selection:
    """The linears of a model that the options quantize: all but the output head, unless patterns say otherwise."""
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if head is not None and module is head]
    return select_linears(model, options.target, options.skip, heads)


def quantize_module(model: PreTrainedModel, name: str, options: QuantizeOptions) -> Solution:
    """Replace one dense linear of a loaded model by its packed form; returns the solution for the report."""
    dense = model.get_submodule(name)
    if not isinstance(dense, nn.Linear):
        raise CheckpointError(f"{name} was chosen for quantization but is a {type(dense).__name__}.")
    solution = solve(name, dense.weight.data, options)
    layer = _quant_linear(dense, options.format, options)
    layer.load_solution(solution)
    replace_module(model, name, layer)
    return solution


def mark_quantized(model: PreTrainedModel, options: QuantizeOptions, modules: Mapping[str, str]) -> None:
    """Give a model that was quantized in place the config and quantizer that a loaded one has."""
    config = BitloftConfig(options, modules=modules)
    model.config.quantization_config = config
    model.hf_quantizer = BitloftQuantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    model.is_quantized = True


def _quant_linear(dense: nn.Linear, spelling: str, options: QuantizeOptions) -> QuantLinear:
    return QuantLinear(
        dense.in_features,
        dense.out_features,
        Format.parse(spelling),
        bias=None if dense.bias is None else dense.bias.data,
        rank=options.start_rank,
        scaling=options.scaling,
        start_format=Format.parse(options.start_format),
        device=dense.weight.device,
    )


def _make_skeleton(model: PreTrainedModel, name: str, spelling: str, options: QuantizeOptions) -> None:
    dense = model.get_submodule(name)
    if not isinstance(dense, nn.Linear):
        raise CheckpointError(f"the config packs {name}, but in this model class that is a {type(dense).__name__}.")
    with torch.device("meta"):
        replace_module(model, name, _quant_linear(dense, spelling, options))


def _local_name(model: PreTrainedModel, name: str) -> str | None:
    """The path of a listed module in this class: a headless class lacks the ``model.`` prefix, another may add it.

    None where this class has no such module at all, such as a head that a headless class drops.
    """
    prefix = f"{model.base_model_prefix}."
    for local in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(local)
        except AttributeError:
            continue
        return local
    return None


def register() -> None:
    """Register the quantization method with transformers, once."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(BitloftConfig)
        register_quantizer(METHOD)(BitloftQuantizer)
