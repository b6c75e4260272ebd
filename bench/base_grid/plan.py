"""Rows, bits and the order of the grid's cells.

A row is a way to make a base and the way it is trained on: ``start`` trains the start itself (LoftQ as published),
``fresh`` a new LoRA of rank 16 over the frozen base. Refining takes REFINE steps, which rows without it are granted as
training steps wherever the two are compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

RANK = 16  # of every trained adapter, and of every start that is trained
SHARED_RANK = 64  # of a start that stays with the base
REFINE = 120
STEPS = (120, 480)
RATES = (2e-4, 5e-4, 1e-3)
SEEDS = (0, 1, 2)
BITS = (2.25, 2.5, 3.25, 4.25)
TASKS = ("wikitext2", "gsm8k", "sst2", "mrpc")

NF = {2.25: "nf2:64", 2.5: "nf2:32", 3.25: "nf3:64", 4.25: "nf4:64"}
LM = {2.25: "lm2:64", 2.5: "lm2:32", 3.25: "lm3:64", 4.25: "lm4:64"}
TRELLIS = {2.25: "trellis2:64", 2.5: "trellis2:32", 3.25: "trellis3:64", 4.25: "trellis4:64"}
ALLOCATED = dict.fromkeys(BITS, "trellis2:256")  # groups that leave room for wider matrices
TENSOR = {2.25: "uniform2:tensor", 3.25: "uniform3:tensor", 4.25: "uniform4:tensor"}  # 2.00, 3.00, 4.00: no group scale


@dataclass(frozen=True)
class Row:
    """``maker``: bitloft, none (the 16-bit model) or a peer; ``settings`` are those of ``bitloft.quantize``."""

    name: str
    formats: Mapping[float, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    trains: str = "fresh"
    maker: str = "bitloft"

    @property
    def refined(self) -> bool:
        return bool(self.settings.get("refine"))

    @property
    def calibrated(self) -> bool:
        """Whether making the base reads the calibration text."""
        return self.refined or self.settings.get("solver") == "calibrated"


LORA16, PUBLISHED, AUTOROUND = "16-bit LoRA", "LoftQ nf", "AutoRound"  # a peer's format is its bits, group 64
CALIBRATED: dict[str, Any] = {"solver": "calibrated", "rank": RANK}
SHARED: dict[str, Any] = {"solver": "calibrated", "rank": SHARED_RANK, "refine": REFINE}
OURS, ONE_WIDTH = "+allocate", "+vector code"  # what --quick has no time for, and what stands for it there

ROWS = (
    Row(LORA16, maker="none"),
    Row(PUBLISHED, NF, {"solver": "loftq", "rank": RANK}, "start"),
    Row("calibrated", LM, CALIBRATED, "start"),
    Row(OURS, ALLOCATED, SHARED | {"refine_against": "teacher", "target_bits": None, "fisher": True}),
    Row(ONE_WIDTH, TRELLIS, SHARED | {"refine_against": "teacher"}),
    Row("LoftQ lm", LM, {"solver": "loftq", "rank": RANK}, "start"),
    Row(AUTOROUND, {2.25: "2", 3.25: "3", 4.25: "4"}, maker="autoround"),
    Row("LoftQ uniform:tensor", TENSOR, {"solver": "loftq", "rank": RANK}, "start"),
    Row("QLoRA", NF, {"solver": "qlora", "rank": 0}),
    Row("+refine, teacher", LM, SHARED | {"refine_against": "teacher"}),
)
# each ingredient alone, and everything but it
ABLATIONS = (
    Row("+refine", LM, SHARED),
    Row("refine alone", LM, SHARED | {"solver": "loftq"}),
    Row("calibrated r64", LM, CALIBRATED | {"rank": SHARED_RANK}),
    Row("calibrated, no feedback", LM, CALIBRATED | {"feedback": "none"}, "start"),
    Row("calibrated, diagonal", LM, CALIBRATED | {"metric": "diagonal"}, "start"),
    Row("calibrated, no data", LM, CALIBRATED | {"metric": "none"}, "start"),
    Row("calibrated, one round", LM, CALIBRATED | {"rounds": 1}, "start"),
    Row("calibrated, projection", LM, CALIBRATED | {"variant": "projection"}, "start"),
    Row("calibrated, split", LM, CALIBRATED | {"split": "auto"}, "start"),
    Row("+refine, 8-bit start", LM, SHARED | {"rank": SHARED_RANK // 2, "start_format": "int8:row"}),
    Row("+refine with scales", LM, SHARED | {"refine_parts": ("start", "scales")}),
    Row("+refine with norms", LM, SHARED | {"refine_parts": ("start", "norms")}),
)


@dataclass(frozen=True)
class Cell:
    """One training run; ``steps`` include what a row without refining is granted."""

    row: Row
    bits: float
    task: str
    seed: int
    steps: int

    @property
    def key(self) -> dict[str, Any]:
        return {"row": self.row.name, "bits": self.bits, "task": self.task, "seed": self.seed, "steps": self.steps}


@dataclass(frozen=True)
class Effort:
    """How much of the grid is run, and how long a run is."""

    rows: tuple[Row, ...]
    bits: tuple[float, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    refine: int
    batch: int = 4
    length: int = 256
    judged: int = 64  # sequences of 512 tokens of the test text, its first ones, or rows
    held: int = 24  # the same, to choose the learning rate by
    samples: int = 128  # calibration sequences of 512 tokens
    plain: bool = True  # whether rows without refining are also run without the steps that they are granted
    base: Mapping[str, Any] = field(default_factory=dict)  # settings of every calibrated base, where some are cut
    ours: str = OURS  # the row that the figures call ours

    def cells(self) -> Iterator[Cell]:
        """The first task, the 2-bit column, the fewest steps and the first seed first, ablations last; of a row without
        refining the run that is granted its steps before the one that is not."""
        for task in self.tasks:
            for bits in self.bits:
                for steps in self.steps:
                    for seed in self.seeds:
                        for row in self.rows:
                            if row.maker == "none" or bits in row.formats:
                                at = 16.0 if row.maker == "none" else bits
                                granted = (steps + self.refine, steps)[: 2 if self.plain else 1]
                                for run in (steps,) if row.refined else granted:
                                    yield Cell(row, at, task, seed, run)

    def only(self, rows: Sequence[str], bits: Sequence[float], steps: Sequence[int], seeds: Sequence[int]) -> "Effort":
        """A part of the grid; an empty choice is all. Raises ValueError for what is not in it."""
        known = {"rows": [row.name for row in self.rows], "bits": self.bits, "steps": self.steps, "seeds": self.seeds}
        for name, asked in (("rows", rows), ("bits", bits), ("steps", steps), ("seeds", seeds)):
            for one in asked:
                if one not in known[name]:
                    raise ValueError(f"{one!r} is none of the {name} {', '.join(map(str, known[name]))}")
        return replace(
            self,
            rows=tuple(row for row in self.rows if not rows or row.name in rows),
            bits=tuple(bits) or self.bits,
            steps=tuple(steps) or self.steps,
            seeds=tuple(seeds) or self.seeds,
        )


CUT: dict[str, Any] = {"rounds": 1, "sweeps": 1}


def effort_of(mode: str) -> Effort:
    """``quick`` is the 2-bit column of three rows, one seed and one learning rate, with a fifteenth of the steps and
    bases of one round and few samples."""
    if mode == "full":
        return Effort(ROWS + ABLATIONS, BITS, TASKS, SEEDS, STEPS, RATES, REFINE)
    few = tuple(row for row in ROWS if row.name in (LORA16, PUBLISHED, ONE_WIDTH))
    if mode == "quick":
        return Effort(
            few, (2.25,), ("wikitext2",), (0,), (8,), (1e-3,), 8,
            judged=8, samples=16, plain=False, base=CUT, ours=ONE_WIDTH,
        )  # fmt: skip
    return Effort(few, (2.25,), ("words", "pairs"), (0,), (2,), (1e-3,), 2, 2, 16, judged=4, samples=4, ours=ONE_WIDTH)
