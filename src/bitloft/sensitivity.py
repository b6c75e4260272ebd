"""Where errors of a base's modules matter: the metric that ``compress(..., weigh=)`` counts them in.

    S = sum_t |g_t|^2 x_t x_t^T     x_t the input of a module at token t, g_t the gradient of the loss by its output
    G = sum_t |x_t|^2 g_t g_t^T

An error D of an adapter's product moves the loss by about g_t . D x_t at a token; its mean square is sum_t (g_t^T D
x_t)^2, of which tr(G D S D^T) is the part that a Kronecker product holds (S and G are its partial traces; K-FAC, arXiv
1503.05671, takes both factors without the weights). Both are divided by their mean diagonal, so the plain norm goes on
deciding between modules. The weights are not optional: a plain mean of x x^T is ruled by the few huge activations at
the first token, which the loss hardly sees. What either side buys at half a bit is in docs/decisions.md.

Memory: one [in, in] and one [out, out] matrix a module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitloft.errors import DataError, OptionError
from bitloft.integrations.loading import load
from bitloft.integrations.record import load_tokenizer
from bitloft.tasks.lm import Collator, check_length, encode_rows, target_losses
from bitloft.tasks.rows import read_rows

ROWS = 32


class Moments(NamedTuple):
    """S [in, in] and G [out, out] by module path, mean diagonal 1."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def second_moments(
    base: str | Path | PreTrainedModel, data: str | Path, *, rows: int = ROWS, length: int = 384
) -> Moments:
    """S and G of every linear layer but the head on the first ``rows`` sequences.

    ``base`` is a packed base directory or a causal model that is loaded already and left as it was; ``data`` are rows
    as training takes them, cut at ``length`` tokens. Modules that the loss does not reach are left out. Raises
    OptionError for rows below 1 or a length that the model does not take, DataError for a bad row and where no module
    is reached.
    """
    if rows < 1:
        raise OptionError(f"rows is {rows}; use 1 or more.")
    model = base if isinstance(base, PreTrainedModel) else load(base)
    check_length(length, model.config)
    tokenizer = load_tokenizer(model.name_or_path if isinstance(base, PreTrainedModel) else base)
    examples, _ = encode_rows(read_rows(data), tokenizer, length)
    collate = Collator.for_tokenizer(tokenizer)
    with collected(model) as found:
        for example in examples[:rows]:
            losses, _ = target_losses(model, collate([example]))
            losses.sum().backward()
    if not found.inputs:
        raise DataError(f"the loss on the first {rows} rows of {data} reaches no linear layer; give other rows.")
    return found


@contextmanager
def collected(model: PreTrainedModel) -> Iterator[Moments]:
    """Moments that hold S and G of each linear layer but the head after the block, summed over what was propagated
    backward inside it. Any loss will do; parameters get no gradients."""
    sums, head = Moments({}, {}), model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    hooks = [m.register_forward_hook(_watched(sums, name)) for name, m in linears.items()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    model.enable_input_require_grads()  # else nothing would carry a gradient through a frozen model
    try:
        with torch.enable_grad():
            yield sums
    finally:
        model.disable_input_require_grads()
        for parameter in trained:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    for side in sums:
        for name, total in list(side.items()):
            mean = float(total.diagonal().mean())
            side.pop(name) if mean == 0 else side.update({name: total / mean})


def _watched(sums: Moments, name: str) -> Callable[..., None]:
    """A forward hook that adds a module's weighted inputs and gradients to ``sums`` once the gradient is there."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)

        def add(gradient: Float[Tensor, "*batch out"]) -> None:
            g = gradient.flatten(0, -2)
            for side, one, other in ((sums.inputs, x, g), (sums.outputs, g, x)):
                side[name] = _weighted(one, other) + side.get(name, 0.0)

        output.register_hook(add)

    return hook


def _weighted(one: Float[Tensor, "tokens n"], other: Float[Tensor, "tokens m"]) -> Float[Tensor, "n n"]:
    """sum_t |other_t|^2 one_t one_t^T."""
    norms: Tensor = torch.linalg.vector_norm(other.float(), dim=1, keepdim=True)
    weighted = one.float() * norms
    return weighted.T @ weighted
