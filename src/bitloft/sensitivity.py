"""Where the inputs of a base's modules matter: the metric that ``compress(..., moments=)`` takes.

    S = sum_t |g_t|^2 x_t x_t^T,   x_t the input of a module at token t, g_t the gradient of the loss by its output

An error D of an adapter's product moves the loss by about g_t . D x_t at a token; with D's direction unknown its mean
square is tr(D S D^T) up to a factor, so S is divided by its mean diagonal and the plain norm goes on deciding between
modules. The weights are not optional: a plain mean of x x^T is ruled by the few huge activations at the first token,
which the loss hardly sees. On the one adapter that was tried this shape helped at half a bit, and the factor between
modules, taken alone into the budget, made it worse (docs/decisions.md).

Memory: one [in, in] matrix a module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitloft.errors import DataError, OptionError
from bitloft.integrations.loading import load, load_tokenizer
from bitloft.tasks.lm import Collator, check_length, encode_rows, target_losses
from bitloft.tasks.rows import read_rows

ROWS = 16


def input_moments(
    base: str | Path | PreTrainedModel, data: str | Path, *, rows: int = ROWS, length: int = 384
) -> dict[str, Tensor]:
    """S [in, in] (mean diagonal 1) of every linear layer but the head, by module path, on the first ``rows`` sequences.

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
    with weighed_inputs(model) as found:
        for example in examples[:rows]:
            losses, _ = target_losses(model, collate([example]))
            losses.sum().backward()
    if not found:
        raise DataError(f"the loss on the first {rows} rows of {data} reaches no linear layer; give other rows.")
    return found


@contextmanager
def weighed_inputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """A dict that holds S (mean diagonal 1) of each linear layer but the head after the block, summed over what was
    propagated backward inside it. Any loss will do; parameters get no gradients."""
    sums, head = dict[str, Tensor](), model.get_output_embeddings()
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
    for name, total in list(sums.items()):
        mean = float(total.diagonal().mean())
        sums.pop(name) if mean == 0 else sums.update({name: total / mean})


def _watched(sums: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A forward hook that adds a module's weighted inputs to ``sums`` once the gradient of its output is there."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)

        def add(gradient: Float[Tensor, "*batch out"]) -> None:
            weights = torch.linalg.vector_norm(gradient.flatten(0, -2).float(), dim=1, keepdim=True)
            weighted = x.float() * weights
            sums[name] = weighted.T @ weighted + sums.get(name, 0.0)

        output.register_hook(add)

    return hook
