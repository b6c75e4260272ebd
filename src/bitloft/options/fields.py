"""Fields with a help text, and the checks that every options class makes once, before any file is touched."""

from collections.abc import Iterable
from dataclasses import field
from math import isfinite
from typing import Any

from bitloft.errors import OptionError


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the CLI."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    """Raise OptionError(message) unless ``condition``."""
    if not condition:
        raise OptionError(message)


DTYPES = ("auto", "float32", "bfloat16")
BASE_MISMATCH = ("refuse", "measure", "allow")


def base_mismatch() -> Any:
    """The field that every verb has in which an adapter meets a base; check it by ``require_mismatch``."""
    return option(
        None,
        "an adapter that does not name this very base: refuse it, measure what it does to the loss here, or allow it "
        "(default: measure on a base of 4 bits or more of the same model, else refuse)",
    )


ACTIVATIONS = ("bf16", "int8")


def activations() -> Any:
    """The field of every verb that runs a packed base; check it by ``require_activations``."""
    return option(
        None,
        "round what packed layers multiply: bf16, or int8 (each row by its largest value); says how much "
        "that moves them (default: no rounding beyond the dtype)",
    )


def require_activations(value: str | None) -> None:
    if value is not None:
        require_choices(activations=(value, ACTIVATIONS))


def require_mismatch(value: str | None) -> None:
    if value is not None:
        require_choices(base_mismatch=(value, BASE_MISMATCH))


def require_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        require(value is None or (isfinite(value) and value > 0), f"{name} is {value}; use a positive number.")


def require_choices(**choices: tuple[str, Iterable[str]]) -> None:
    for name, (value, allowed) in choices.items():
        require(value in allowed, f"unknown {name} {value!r}; use one of {', '.join(allowed)}.")
