"""Every verb's options as frozen dataclasses, without torch: the CLI is made from them, and so is the Python API.

A field's ``help`` becomes the flag's help text. Values are checked here, once, before any file is touched.
"""

from dataclasses import dataclass, field
from typing import Any

from bitloft.errors import OptionError
from bitloft.formats import Format

SOLVERS = ("loftq", "qlora")
STARTS = ("frozen", "trainable")


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the CLI."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    """Raise OptionError(message) unless ``condition``."""
    if not condition:
        raise OptionError(message)


@dataclass(frozen=True)
class QuantizeOptions:
    """How a base is quantized and how its LoRA start is found."""

    format: str = option("lm4:64", "number format of the weights, such as nf4:64, lm2:64 or uniform3:128")
    solver: str = option("loftq", "loftq (repair the error with a low-rank start) or qlora (round, start at zero)")
    rank: int = option(16, "rank of the start; 0 stores none")
    alpha: float | None = option(None, "scaling numerator of the start (default: the rank)")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    steps: int = option(5, "LoftQ alternations T; the best iterate is kept")
    target: tuple[str, ...] = option((), "quantize only linears whose name matches one of these shell patterns")
    skip: tuple[str, ...] = option((), "leave linears whose name matches one of these shell patterns in 16 bit")
    start_format: str = option("lm4:64", "number format in which the start's factors are stored")
    seed: int = option(0, "seed of the randomized SVD")

    def __post_init__(self) -> None:
        for text in (self.format, self.start_format):
            Format.parse(text)
        require(self.solver in SOLVERS, f"unknown solver {self.solver!r}; use one of {', '.join(SOLVERS)}.")
        require(self.rank >= 0, f"rank is {self.rank}; use 0 or more.")
        require(self.alpha is None or self.alpha > 0, f"alpha is {self.alpha}; use a positive number.")
        require(self.steps >= 1, f"steps is {self.steps}; use 1 or more.")

    @property
    def scaling(self) -> float:
        """s0 of W ~ Q + s0 * B0 @ A0: alpha / r, or alpha / sqrt(r) with rslora; 0 without a start."""
        if not self.rank:
            return 0.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)
