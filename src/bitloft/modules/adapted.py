"""The linear of a model that a pair of factors adapts, found and checked before anything is folded into it.

Only layers that own their weight are handed out: a plain linear or a packed one. A weight that two modules share (a
head tied to its table) would change in both places, and a fused or pooled one is no matrix of these widths.
"""

from torch import nn

from bitloft.errors import AdapterError
from bitloft.factors import Pair
from bitloft.modules.linear import QuantLinear


def linear_of(model: nn.Module, name: str, pair: Pair, where: object) -> nn.Linear:
    """The module at the path ``name``, to be changed by ``pair``; ``where`` names the adapter in errors.

    Raises AdapterError where there is none, where it is no linear of those widths, and where its weight is shared.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"adapter {where} adapts {name}, which the base does not have; it belongs to another base."
        ) from None
    if not isinstance(layer, nn.Linear) or not (isinstance(layer, QuantLinear) or type(layer) is nn.Linear):
        raise AdapterError(f"adapter {where} adapts {name}, which is a {type(layer).__name__}; only linears can be.")
    shape, adapted = (layer.out_features, layer.in_features), (pair.b.shape[0], pair.a.shape[1])
    if shape != adapted:
        raise AdapterError(f"adapter {where} adapts {name} as {adapted}; in this base it is {shape}.")
    if any(other is not layer and getattr(other, "weight", None) is layer.weight for other in model.modules()):
        raise AdapterError(f"{name} shares its weight with another module, which would change too; keep {where} apart.")
    return layer
