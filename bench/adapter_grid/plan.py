"""What the grid holds, in the order in which it is worth having: adapters (``Setting``), and ways to pack them.

What the figures need comes first: three seeds of one task at r16 on the first base, then on the next, then the other
tasks, ranks, starts; of each adapter first the published method and the sizes of water-filling.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = dict[str, Any]
SIZES = (0.5, 0.8, 0.3, 0.2, 1.2, 1.85, 2.8)
TASKS = ("gsm8k", "reference", "mbpp", "humaneval", "xsum")
ENCODER_TASKS = ("sst2", "mrpc")
REFINED = "+refine"  # behind a format: calibrated with a start of rank 64 that was refined, the best base of two bits
BASES = ("nf4:64", "lm2:64" + REFINED)
ENCODER_BASES = ("nf4:64", "lm2:64")
STARTED = ("lm2:64", "lm3:64", "lm4:64")  # where a frozen and a trained start are compared
RANK = 16
OURS, THEIRS, PLAIN = "waterfill", "loraquant 2@0.8", "waterfill blind"
SAME = "loraquant's bits"
JOINT, DISTILLED = "joint", "waterfill distilled"
SCALAR = "waterfill scalar"  # the ablation of its codes
INPUTS = "waterfill inputs"  # the ablation of its metric: of inputs alone
CODE = (
    "trellis"  # of the other ways of water-filling; part of their cells' keys, so cells of other codes are not theirs
)
DISTILL = 40  # steps
BOTH = "inputs+outputs"


def code_key(method: str) -> Key:
    """What a cell's key says of its codes and metric; methods that never changed theirs say nothing."""
    if not method.startswith(OURS):
        return {}
    metric = {} if method in (PLAIN, INPUTS) else {"metric": BOTH}
    return {"code": "scalar" if method == SCALAR else CODE} | metric


@dataclass(frozen=True)
class Effort:
    """How much is trained and judged: optimizer steps, and held-out rows at most. Cells of different efforts are
    different cells."""

    steps: int
    rows: int
    learning_rate: float = 1e-3
    length: int = 384


FULL, TOY = Effort(steps=40, rows=40), Effort(steps=2, rows=4, length=32)


@dataclass(frozen=True)
class Setting:
    """One adapter of the grid. Rank 0 stands for none: the base alone."""

    base: str
    task: str
    rank: int
    seed: int
    effort: Effort
    start: str = "frozen"

    @property
    def name(self) -> str:
        ending = "" if self.start == "frozen" else "-trained-start"
        return f"{self.task}-{self.base.replace(':', '_')}-r{self.rank}-s{self.seed}-{self.effort.steps}{ending}"

    def key(self, method: str, asked: object = "") -> Key:
        """What its cell is known by."""
        named = {"base": self.base, "task": self.task, "rank": self.rank, "seed": self.seed, "start": self.start}
        effort = {"steps": self.effort.steps, "rows": self.effort.rows}
        return named | effort | {"method": method, "asked": asked} | code_key(method)

    @property
    def alone(self) -> "Setting":
        """The base knows neither rank nor seed nor training: one cell serves all adapters of a task."""
        untrained = Effort(0, self.effort.rows, self.effort.learning_rate, self.effort.length)
        return Setting(self.base, self.task, 0, 0, untrained)


@dataclass(frozen=True)
class Way:
    """A method at one size. ``settings`` are those of compress; ``moments`` hands it the base's second moments: of
    "inputs", or of both inputs and output gradients."""

    method: str
    asked: object = ""
    settings: dict[str, Any] = field(default_factory=dict)
    moments: str = ""


def settings(mode: str, bases: Sequence[str]) -> list[Setting]:
    """The adapters of a mode, most important first."""
    if mode == "smoke":
        return [Setting("nf4:64", "words", 8, seed, TOY) for seed in range(2)]
    if mode == "quick":
        return [Setting("nf4:64", "gsm8k", RANK, 0, FULL)]
    first = [Setting(base, "gsm8k", RANK, seed, FULL) for base in bases for seed in range(3)]
    starts = [Setting(base, "gsm8k", RANK, 0, FULL, start) for base in STARTED for start in ("frozen", "trainable")]
    encoders = [Setting(base, task, RANK, 0, FULL) for task in ENCODER_TASKS for base in ENCODER_BASES]
    tasks = [Setting(base, task, RANK, seed, FULL) for task in TASKS for base in bases for seed in range(3)]
    ranks = [Setting(base, task, rank, 0, FULL) for rank in (8, 64) for task in TASKS for base in bases]
    return list(dict.fromkeys([*first, *starts, *encoders, *tasks, *ranks]))


def steps(mode: str, planned: Sequence[Setting]) -> Iterator[tuple[Setting, Way]]:
    """Every adapter with every way, what the figures need of the first ones before the rest of any."""
    first = [s for s in planned if (s.task, s.rank, s.start) == ("gsm8k", RANK, "frozen")]
    needed = [way for way in ways(mode) if way.method in (OURS, THEIRS)]
    yield from ((setting, way) for setting in first for way in needed)
    for setting in planned:
        for way in ways(mode):
            if setting.task not in ENCODER_TASKS or "distill" not in way.settings:  # it learns from next tokens
                yield setting, way


def ways(mode: str) -> Iterator[Way]:
    """Methods and sizes in order of importance."""
    sizes = {"smoke": (3.0, 4.0), "quick": SIZES[:4], "full": SIZES}[mode]
    yield Way(THEIRS, "", {"method": "loraquant", "high": 2, "ratio": 0.8})
    # below one bit joint refinement in a metric costs most of the time and gains a thousandth (docs/decisions.md)
    yield from (Way(OURS, size, {"bits": size, "refine": size > 1}, moments=BOTH) for size in sizes)
    yield Way("truncate 16", 1, {"method": "truncate", "rank": 1})
    yield Way("truncate 8", 1, {"method": "truncate", "rank": 1, "width": 8})
    yield Way(PLAIN, sizes[0], {"bits": sizes[0]})
    if mode == "smoke":
        yield Way("pb_llm")
    if mode == "full":
        yield from _more()


def _more() -> Iterator[Way]:
    """What only the whole grid has."""
    yield Way(DISTILLED, 0.5, {"bits": 0.5, "refine": False, "distill": DISTILL}, moments=BOTH)
    yield from (Way(INPUTS, size, {"bits": size, "refine": False}, moments="inputs") for size in SIZES[:4])
    yield from (
        Way(SCALAR, size, {"bits": size, "code": "scalar", "refine": False}, moments=BOTH) for size in SIZES[:2]
    )
    yield from (Way("truncate 8", rank, {"method": "truncate", "rank": rank, "width": 8}) for rank in (2, 4))
    yield Way("truncate 16", 2, {"method": "truncate", "rank": 2})
    yield Way("loraquant 3@0.9", "", {"method": "loraquant", "high": 3, "ratio": 0.9})
    yield from (Way(PLAIN, size, {"bits": size}) for size in SIZES[1:])
    yield Way("waterfill refined", 0.5, {"bits": 0.5}, moments=BOTH)
    yield Way("sign", "", {"method": "sign"})
    yield from (Way(name, high, {"method": name, "high": high}) for name in ("rtn", "gptq") for high in (2, 3))
    yield from (Way(name) for name in ("pb_llm", "billm", "loraquant across"))
    yield from (Way("truncate 16 by norm", rank) for rank in (1, 2))
    yield from (Way(f"loraquant by {by}", "", {"method": "loraquant", "split": by}) for by in ("norm", "random"))
    yield Way("loraquant unrefined", "", {"method": "loraquant", "refine": False})
