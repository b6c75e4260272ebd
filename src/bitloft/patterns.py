"""Texts that options are written in: shell patterns over module paths, PATTERN=VALUE, K=FORMAT, a number or ``auto``.

Torch-free and below ``options``, which checks its fields by these; ``rules`` applies them to a model's modules. Texts
rather than mappings, because a flag on the command line, a field in a config file and a keyword are then one thing.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import isfinite

from bitloft.errors import OptionError
from bitloft.formats import Format


def matches(name: str, pattern: str) -> bool:
    """True where a shell pattern matches a module path, or its end after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def patterns(field: str, given: Sequence[str]) -> tuple[str, ...]:
    """A list as a tuple. Raises OptionError for a bare text, which would be read as one pattern a letter."""
    if isinstance(given, str):
        raise OptionError(f"{field} is the text {given!r}; use a list of patterns.")
    return tuple(given)


def split_rule(field: str, rule: str) -> tuple[str, str]:
    """PATTERN=VALUE as (pattern, value). Raises OptionError where either is missing."""
    pattern, _, value = rule.rpartition("=")
    if not (pattern.strip() and value.strip()):
        raise OptionError(f"{field} {rule!r} is not PATTERN=VALUE.")
    return pattern.strip(), value.strip()


def number_rule(field: str, rule: str) -> float:
    """The number of PATTERN=NUMBER, 0 or more. Raises OptionError for anything else."""
    value = split_rule(field, rule)[1]
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not (isfinite(number) and number >= 0):
        raise OptionError(f"{field} {rule!r}: {value!r} cannot be used; use PATTERN=NUMBER with 0 or more.")
    return number


def first_layers_of(text: str | None) -> tuple[int, str]:
    """K=FORMAT as (K, format); (0, "") for None. Raises OptionError where K is no positive number."""
    if text is None:
        return 0, ""
    count, _, fmt = text.partition("=")
    if not (count.isdecimal() and int(count)):
        raise OptionError(f"first_layers {text!r} is not K=FORMAT, such as 4=nf4:64.")
    return int(count), str(Format.parse(fmt))


def steps_of(given: int | str) -> int | str:
    """``auto`` (also for 0), or a number of 1 or more; digits are read, since a flag gives text."""
    steps = int(given) if isinstance(given, str) and given.isdecimal() else given
    if steps in ("auto", 0):
        return "auto"
    if not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps is {given!r}; use 1 or more, or auto.")
    return steps
