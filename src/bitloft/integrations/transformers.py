"""transformers: a quantization method named ``bitloft``, so that any Auto class reads, makes and saves our bases.

The config lists every packed module with its format, so loading never guesses: the skeleton is built from that map on
the meta device, then tensors load by name. Quantizing on load goes through the same ``solve`` as the quantize verb.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
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
from bitloft.integrations.packing import (
    forbid_resize,
    forget_conversions,
    local_name,
    matrices_of,
    pack,
    packed_at,
    unpack,
    weights_in,
)
from bitloft.modules.parts import stored_tensors
from bitloft.modules.select import select_modules
from bitloft.options import QuantizeOptions
from bitloft.rules import ROTATED, ModulePlan, StoredModule, resolve
from bitloft.solvers import Solution, Statistics, solve
from bitloft.solvers.base import Calibrated

METHOD = "bitloft"
SCHEMA = 1


class BitloftConfig(QuantizationConfigMixin):
    """``quantization_config`` of a bitloft base: how it was quantized, and ``modules``: path -> what is stored of it
    (``rules.StoredModule``: the format as a text, or a dict where more differs from the options).

    Without ``modules`` (quantize on load) the options choose them. Unknown options raise TypeError; another schema
    raises CheckpointError.
    """

    def __init__(
        self,
        options: QuantizeOptions | Mapping[str, Any] | None = None,
        *,
        modules: Mapping[str, Any] | None = None,
        schema: int = SCHEMA,
        bitloft_version: str = __version__,
        quant_method: str = METHOD,
        **kwargs: Any,
    ) -> None:
        if schema != SCHEMA:
            raise CheckpointError(f"this base has schema {schema}; bitloft {__version__} reads schema {SCHEMA}.")
        known = {f.name for f in fields(QuantizeOptions)}
        own = asdict(options) if isinstance(options, QuantizeOptions) else options
        given = dict(own or {}) | kwargs
        unknown = set(given) - known
        if unknown:
            raise CheckpointError(f"quantization_config holds the unknown option {sorted(unknown)[0]!r}.")
        self.quant_method = METHOD
        self.bitloft_version = bitloft_version
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        self.options = QuantizeOptions(**settings)
        self.modules = None if modules is None else dict(modules)
        self.stored()

    def stored(self) -> dict[str, StoredModule]:
        """What each packed module holds. Raises CheckpointError for an entry that cannot be read."""
        return {name: StoredModule.read(entry, self.options, name) for name, entry in (self.modules or {}).items()}

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
    """Builds the skeleton, quantizes on load, saves. ``errors`` holds (before, after) of every matrix that it solved,
    ``calibrated`` the same where inputs are, ``left`` the reasons for what it left alone. ``statistics`` of the inputs
    are given by who gathers them, before the matrices that they are of are solved."""

    requires_calibration = False
    quantization_config: BitloftConfig

    def __init__(self, quantization_config: BitloftConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.errors: dict[str, tuple[float, float]] = {}
        self.calibrated: dict[str, Calibrated] = {}
        self.statistics: dict[str, Statistics] = {}
        self.left: dict[str, str] = {}
        self.plans: dict[str, ModulePlan] = {}
        self.tables: dict[str, str] = {}  # digests of the tables solved so far

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if config.modules is None or not self.pre_quantized:
            selection = select_modules(model, config.options, weights_in(model, checkpoint_files))
            self.left = selection.left
            self.plans = resolve(tuple(selection.chosen), config.options)
            if config.options.rotate:
                kinds = selection.chosen
                self.plans = {n: replace(plan, rotated=kinds[n] in ROTATED) for n, plan in self.plans.items()}
            # a config of its own: the caller may quantize other models by the same one
            config = BitloftConfig(config.options, modules=entries(self.plans, config.options, selection.chosen))
            self.quantization_config = config
        for name, stored in config.stored().items():
            local = local_name(model, name, stored.kind)
            if local is not None:
                pack(model, local, stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        forget_conversions(model)
        forbid_resize(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and packed_at(model, param_name) is not None

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
        unpack(model, dtype or torch.float32)
        return model


class _Quantize(ConversionOps):
    """Turns one dense weight, as it is read, into the parts of its packed module."""

    def __init__(self, quantizer: BitloftQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module | None = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        if model is None:
            raise CheckpointError("transformers gave no model to quantize into; this transformers version is unknown.")
        result: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            at = packed_at(model, key)
            if at is None:
                raise CheckpointError(f"{key} was chosen for quantization but is not packed.")
            if self._seen(*at, weight):
                continue
            solutions = self._solve(model, *at, weight)
            parts = stored_tensors(*at, solutions)
            for part in parts if missing_keys is not None else ():
                missing_keys.discard(part)
            result |= parts
        return result

    def _solve(self, model: nn.Module, name: str, kind: str, weight: Tensor) -> list[Solution]:
        quantizer, solutions = self.quantizer, []
        for matrix, values in matrices_of(model, name, kind, weight):
            options, statistics = quantizer.quantization_config.options, quantizer.statistics.get(matrix)
            solution = solve(matrix, values, quantizer.plans[name], options, statistics)
            quantizer.errors[matrix] = (solution.error_before, solution.error_after)
            if solution.calibrated is not None:
                quantizer.calibrated[matrix] = solution.calibrated
            solutions.append(solution)
        return solutions

    def _seen(self, name: str, kind: str, weight: Tensor) -> bool:
        """True for a table that came before under another of its names; it is one matrix, and must be."""
        if kind != "embedding":
            return False
        digest = sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
        if self.quantizer.tables.setdefault(name, digest) != digest:
            raise CheckpointError(
                f"the checkpoint holds two tables for {name}, which this model ties, and they differ; "
                "set tie_word_embeddings to false in its config."
            )
        return name in self.quantizer.errors


def entries(plans: Mapping[str, ModulePlan], options: QuantizeOptions, kinds: Mapping[str, str]) -> dict[str, Any]:
    """``quantization_config.modules`` of modules that are quantized by these plans, each of its kind."""
    return {name: StoredModule.of(plan, options, kinds[name]).entry(options) for name, plan in plans.items()}


def register() -> None:
    """Register the quantization method with transformers, once."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(BitloftConfig)
        register_quantizer(METHOD)(BitloftQuantizer)
