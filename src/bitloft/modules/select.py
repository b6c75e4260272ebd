"""Which modules of a model are quantized, and why each of the others is left alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bitloft.errors import OptionError


@dataclass(frozen=True)
class Selection:
    """Module paths to quantize, in model order, and path -> reason for every other module that holds a weight."""

    chosen: tuple[str, ...]
    left: dict[str, str]


def select_linears(
    model: nn.Module, target: Sequence[str] = (), skip: Sequence[str] = (), heads: Sequence[str] = ()
) -> Selection:
    """Choose the ``nn.Linear`` modules that match ``target`` (all, where empty) and not ``skip``; never ``heads``.

    Patterns are shell patterns; they match the whole path, or its end after a dot. Raises OptionError for a pattern
    that matches no linear, and where nothing is left to quantize.
    """
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for kind, patterns in (("target", target), ("skip", skip)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in linears):
                raise OptionError(
                    f"{kind} pattern {pattern!r} matches none of the model's {len(linears)} linear modules."
                )
    left: dict[str, str] = {}
    chosen = []
    for name, module in model.named_modules():
        reason = _reason(name, module, target, skip, heads)
        if reason:
            left[name] = reason
        elif type(module) is nn.Linear:
            chosen.append(name)
    if not chosen:
        raise OptionError("no module is left to quantize; widen target or narrow skip.")
    return Selection(tuple(chosen), left)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _reason(
    name: str, module: nn.Module, target: Sequence[str], skip: Sequence[str], heads: Sequence[str]
) -> str | None:
    """Why a module that holds a weight of its own is left in 16 bit; None for a linear to quantize or no weight."""
    if not any(True for _ in module.parameters(recurse=False)):
        return None
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is kept in 16 bit"
    if name in heads:
        return "output head is kept in 16 bit"
    if any(_matches(name, pattern) for pattern in skip):
        return "matches skip"
    if target and not any(_matches(name, pattern) for pattern in target):
        return "does not match target"
    return None
