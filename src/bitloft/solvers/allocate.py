"""Bits per matrix under one byte budget for all: where a byte removes the most squared error, it is spent first.

    minimize  sum_i e_i(f_i)   subject to   sum_i bytes_i(f_i) <= budget

over formats f_i of one family at its widths (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of
quantizers"). Each matrix's (bytes, error) points are cut down to their lower convex hull, the hull's steps of all
matrices are taken in the order of error saved per byte, and what is left of the budget goes to any upgrade that still
fits. That is optimal up to the last step taken; an integer program would gain less than one matrix's step.

Bytes are those of ``layout``: scales, zero points and padding count. Errors are measured, by one encode each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from bitloft.errors import FormatError, OptionError
from bitloft.formats import Format, layout
from bitloft.kernels.ops import decode, encode

# One width for all may exceed the budget by this much and still be compared with: 3.25 bits mean lm3:64, though four
# bytes of exponent per matrix make it 3.2501.
SLACK = 1e-3


@dataclass(frozen=True)
class Choice:
    """One format for one matrix: stored bytes, and the squared error |W - Q|^2."""

    format: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """A format for every matrix, with the true bits per weight and the squared error of all; beside it the widest
    single format that is not larger (but for SLACK), ``uniform``."""

    formats: dict[str, str]
    target_bits: float
    true_bits: float
    error: float
    uniform: str
    uniform_bits: float
    uniform_error: float


def widths_of(fmt: Format | str) -> tuple[str, ...]:
    """The family of ``fmt`` at each of its widths, narrowest first; group and suffixes as they are.

    Raises OptionError for a family of one width.
    """
    fmt, found = Format.parse(fmt), []
    for bits in (1, 2, 3, 4):
        try:
            found.append(str(replace(fmt, bits=bits)))
        except FormatError:
            continue
    if len(found) < 2:
        raise OptionError(f"target_bits chooses among widths; {fmt.family} codes have one only, use another format.")
    return tuple(found)


def stored_bytes(shape: tuple[int, ...], fmt: Format | str) -> int:
    """Bytes of a tensor of ``shape`` in ``fmt``, scales and padding included."""
    return sum(part.nbytes for part in layout(shape, Format.parse(fmt)).values())


def measure(weight: Float[Tensor, "..."], formats: Sequence[str]) -> tuple[Choice, ...]:
    """Bytes and squared error of ``weight`` in each format. ``weight`` is float32."""
    return tuple(
        Choice(
            fmt,
            stored_bytes(tuple(weight.shape), fmt),
            float((weight - decode(encode(weight, fmt))).double().square().sum()),
        )
        for fmt in formats
    )


def add(first: Sequence[Choice], second: Sequence[Choice]) -> tuple[Choice, ...]:
    """Choices of two matrices that must share one format, such as the experts of a layer."""
    return tuple(Choice(a.format, a.bytes + b.bytes, a.error + b.error) for a, b in zip(first, second, strict=True))


def allocate(choices: Mapping[str, Sequence[Choice]], weights: int, target_bits: float) -> Allocation:
    """A choice for each name, of least total error at no more than ``target_bits`` true bits for ``weights`` values.

    All names have the same formats to choose from, in the same order. Raises OptionError where the target lies below
    the narrowest format, or above the widest by more than a hundredth.
    """
    budget = int(target_bits * weights / 8)
    totals = [_total([options[i] for options in choices.values()]) for i in range(len(next(iter(choices.values()))))]
    smallest, largest = min(t.bytes for t in totals), max(t.bytes for t in totals)
    if not smallest <= budget <= largest * 1.01:
        low, high = (f"{8 * size / weights:.3f} ({totals[i].format})" for size, i in ((smallest, 0), (largest, -1)))
        raise OptionError(f"target_bits {target_bits} is out of reach; these matrices take from {low} to {high} bits.")
    chosen = {name: min(options, key=lambda c: (c.bytes, c.error)) for name, options in choices.items()}
    spent = sum(choice.bytes for choice in chosen.values())
    for steps in (_hull_steps(choices), _all_steps(choices)):
        for name, before, after in steps:
            fits = spent + after.bytes - chosen[name].bytes <= budget
            if fits and (before is None or chosen[name] == before) and after.error < chosen[name].error:
                spent += after.bytes - chosen[name].bytes
                chosen[name] = after
    found = _total(list(chosen.values()))
    uniform = max((t for t in totals if t.bytes <= budget * (1 + SLACK)), key=lambda t: t.bytes)
    if uniform.bytes <= budget and uniform.error < found.error:  # the greedy order may miss by its last step
        index = totals.index(uniform)
        found, chosen = uniform, {name: options[index] for name, options in choices.items()}
    return Allocation(
        formats={name: choice.format for name, choice in chosen.items()},
        target_bits=target_bits,
        true_bits=8 * found.bytes / weights,
        error=found.error,
        uniform=uniform.format,
        uniform_bits=8 * uniform.bytes / weights,
        uniform_error=uniform.error,
    )


def _total(chosen: Sequence[Choice]) -> Choice:
    return Choice(chosen[0].format, sum(c.bytes for c in chosen), sum(c.error for c in chosen))


def _hull_steps(choices: Mapping[str, Sequence[Choice]]) -> list[tuple[str, Choice | None, Choice]]:
    """Steps between neighbors on each lower hull, by error saved per byte; a matrix's own steps come in order."""
    steps = [(name, a, b) for name, options in choices.items() for a, b in pairwise(_hull(options))]
    return [*sorted(steps, key=lambda s: -_slope(s[1], s[2]))]


def _all_steps(choices: Mapping[str, Sequence[Choice]]) -> Iterator[tuple[str, Choice | None, Choice]]:
    """Every choice of every matrix as an upgrade from whatever it has, largest first."""
    upgrades = [(name, None, choice) for name, options in choices.items() for choice in options]
    yield from sorted(upgrades, key=lambda s: -s[2].bytes)


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of (bytes, error), narrowest first, errors falling."""
    hull: list[Choice] = []
    for choice in sorted(options, key=lambda c: (c.bytes, c.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (a.error - b.error) / max(b.bytes - a.bytes, 1)
