"""How much the loss depends on every output of a model's linears: the mean square of its gradient, the Fisher weight.

    d(loss) ~ 1/2 sum over outputs i of  f_i * |e_i x|^2      e_i: the error of row i, f_i = mean over tokens of g_i^2

Block by block nothing is known of the loss, so this is one pass of the whole 16-bit model, forward and back, with all
of it in memory in float32, a sequence at a time: the one part of calibration that is not bounded by a block, and an
option for that reason. The loss is that of the next token (of the text to be written, for an encoder-decoder).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitloft.calibrate.text import Batch
from bitloft.errors import OptionError
from bitloft.integrations.source import Source
from bitloft.tasks.lm import IGNORED, target_losses
from bitloft.tasks.precision import choose_precision

LEAST = 0.01  # of a matrix's mean: what no token of a short text depended on is not free


def output_weights(source: Source, batches: Sequence[Batch]) -> dict[str, Float[Tensor, " rows"]]:
    """Fisher weight of every output of every linear (and Conv1D) by module path, floored at LEAST of their mean.

    Raises OptionError for a model without a next-token loss.
    """
    model: Any = source.load().float().eval()
    decoder = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) or model.config.is_encoder_decoder
    if not decoder or model.get_output_embeddings() is None:
        raise OptionError(
            f"fisher weighs outputs by the gradients of a next-token loss, which {type(model).__name__} does not have; "
            "leave it out."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sums: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda m, args, out: out.requires_grad_(True)))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_hook(_noting(name, sums)))
    tokens, precision = 0, choose_precision("auto", model.device)
    try:
        with torch.enable_grad():
            for batch in batches:
                for at in range(len(batch.inputs["input_ids"])):
                    one = {key: value[at : at + 1] for key, value in batch.inputs.items()}
                    with precision.autocast(model.device):
                        losses = _losses(model, one)
                    losses.sum().backward()
                    tokens += losses.numel()
    finally:
        for handle in handles:
            handle.remove()
    means = {name: found / max(tokens, 1) for name, found in sums.items()}
    return {name: mean.clamp_min(LEAST * float(mean.mean())) for name, mean in means.items() if float(mean.max()) > 0}


def _noting(name: str, sums: dict[str, Tensor]) -> Any:
    """A forward hook that adds the squares of the output's gradient when it comes."""

    def add(gradient: Tensor) -> None:
        squares = gradient.float().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(add)

    return note


def _losses(model: Any, inputs: dict[str, Tensor]) -> Float[Tensor, " targets"]:
    """The loss of every target of one sequence."""
    if model.config.is_encoder_decoder:
        logits, labels = model(**inputs).logits[:, :-1], inputs["decoder_input_ids"][:, 1:]
        mask = inputs.get("decoder_attention_mask")
        labels = labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, IGNORED)
        found: Tensor = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return found[labels.flatten() != IGNORED]
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    return target_losses(model, inputs | {"labels": labels})[0]
