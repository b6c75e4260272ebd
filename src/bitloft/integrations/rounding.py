"""Rounded activations, ``activations="bf16"`` or ``"int8"``: the choice for a whole model, and its cost in exactness.

The default computes float32 input in float32. Whoever asks for less is told how far the products move: each packed
layer's product of the inputs that a short run of the model gives it, against the definition in float32. Tokens of that
run are evenly spread over the vocabulary, no text: the figure says what rounding does to a layer, not to a task;
``bitloft eval`` with and without the option says that.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitloft.errors import KernelError, OptionError
from bitloft.kernels import ops
from bitloft.modules.linear import QuantLinear, quant_linears

TOKENS = 32  # of the run that is measured

log = logging.getLogger("bitloft")


class Moved(NamedTuple):
    """Relative errors |y - y32| / |y32| of the packed layers' products: the middle one, the largest, whose that is."""

    median: float
    worst: float
    layer: str


def round_activations(model: PreTrainedModel, kind: str) -> Moved | None:
    """Have every packed layer of ``model`` round what it multiplies to ``kind``; log and return what that moves.

    None for a model without packed layers. Raises OptionError, and leaves the model as it was, for an unknown kind and
    where ``int8`` has no kernel for a layer.
    """
    layers = quant_linears(model)
    if kind not in ops.ACTIVATIONS:
        raise OptionError(f"unknown activations {kind!r}; use one of {', '.join(ops.ACTIVATIONS)}.")
    if not layers:
        return None
    try:
        errors = measured(model, kind)
    except KernelError as error:
        raise OptionError(f"activations {kind} cannot be used here: {error}") from error
    for layer in layers.values():
        layer.activations = kind
    worst = max(errors, key=lambda name: errors[name])
    moved = Moved(sorted(errors.values())[len(errors) // 2], errors[worst], worst)
    log.warning(
        "activations %s: products of packed layers differ from float32's by %.2g %% (median; %.2g %% in %s)",
        kind, 100 * moved.median, 100 * moved.worst, moved.layer,
    )  # fmt: skip
    return moved


@torch.no_grad()
def measured(model: PreTrainedModel, kind: str) -> dict[str, float]:
    """By layer, the relative error of its product with rounded operands, on inputs that the model itself gives it."""
    errors: dict[str, float] = {}

    def watch(name: str) -> Any:
        def measure(layer: QuantLinear, given: tuple[Tensor, ...]) -> None:
            x, weight = given[0].float(), layer.operand()
            exact = ops.packed_linear(x, weight)
            found = ops.packed_linear(x, weight, activations=kind)
            errors[name] = float((found - exact).norm() / exact.norm().clamp_min(1e-30))

        return measure

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in quant_linears(model).items()]
    try:
        model(**_tokens(model))
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def _tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.linspace(0, size - 1, TOKENS, device=model.device).long()[None]
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
