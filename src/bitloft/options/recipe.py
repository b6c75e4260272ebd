"""A recipe: one task on one model, the regimes to compare, their settings and seeds, as a TOML file.

    name = "deberta-v3-base-mnli"        model = "microsoft/deberta-v3-base"        task = "mnli"
    data = "${DATA}/mnli"                a folder or file; left out: from the hub
    seeds = [0, 1, 2, 3]                 length = 128
    [train]                              fields of TrainOptions, but rank, alpha, start and seed
    [quantize]                           fields of QuantizeOptions for every row
    [[rows]]                             regime, format, rank, ...: a list stands for one row for each of its values
    regime = ["qlora", "loftq"]
    format = ["nf2:64", "nf4:64"]
    rank = [16, 32]
    [rows.quantize]                      the same for these rows only
    steps = 5

``${NAME}`` is an environment variable. Regimes: ``full`` (every weight, in float), ``lora`` (float base), ``qlora``
(rounded base), ``qalora`` (pooled adapter over a format with +shift), ``loftq``, ``calibrated``.
"""

import itertools
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bitloft.errors import BitloftError, OptionError
from bitloft.formats import Format
from bitloft.options.fields import require, require_choices
from bitloft.options.quantize import QuantizeOptions
from bitloft.options.train import STARTS, TrainOptions

REGIMES = ("full", "lora", "qlora", "qalora", "loftq", "calibrated")
FLOAT = ("full", "lora")  # whose base is not quantized
STARTED = ("loftq", "calibrated")  # whose base has a start


@dataclass(frozen=True)
class Row:
    """One line of the table: how the model is held and what of it is trained. ``format`` is None for a float base.

    ``start`` says whether a start is trained itself (LoftQ as published) or stays frozen below a fresh adapter.
    """

    regime: str
    format: str | None = None
    rank: int = 16
    alpha: float | None = None
    start: str = "trainable"
    lr: float | None = None
    untrained: bool = False
    name: str = ""
    quantize: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choices(regime=(self.regime, REGIMES), start=(self.start, STARTS))
        require(
            (self.format is None) == (self.regime in FLOAT),
            f"a row of regime {self.regime} has format {self.format!r}; "
            + ("leave it out." if self.regime in FLOAT else "give one such as nf2:64."),
        )
        require(self.rank >= 1, f"a row has rank {self.rank}; use 1 or more.")
        if self.format is not None:
            shifted = Format.parse(self.format).shift
            require(
                shifted or self.regime != "qalora",
                f"qalora merges into shifts, and {self.format} has none; use {self.format}+shift.",
            )
            self.options  # noqa: B018 (a bad setting is refused now)

    @property
    def label(self) -> str:
        """What the row is called: given, or made of what tells it from others."""
        words = [self.regime, self.format or "16 bit", f"r{self.rank}" if self.regime != "full" else ""]
        return self.name or " ".join(word for word in words if word)

    @property
    def options(self) -> QuantizeOptions:
        """How its base is quantized; OptionError for a setting that does not exist."""
        unknown = set(self.quantize) - {f.name for f in fields(QuantizeOptions)}
        require(not unknown, f"quantize has no setting {', '.join(sorted(unknown))}.")
        solver: dict[str, Any] = {
            "rank": self.rank if self.regime in STARTED else 0,
            "solver": self.regime,
            "format": self.format,
        }
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.quantize.items()}
        if self.regime in STARTED and self.alpha is not None:
            solver["alpha"] = self.alpha
        return QuantizeOptions(**(solver | given))


@dataclass(frozen=True)
class Recipe:
    """A task, a model and the rows to compare; ``rates`` are learning rates to search equally for every row."""

    name: str
    model: str
    task: str
    rows: tuple[Row, ...]
    data: str | None = None
    calibrate: str | None = None
    metric: str | None = None
    length: int = 128
    train_rows: int | None = None
    test_rows: int | None = None
    held_rows: int = 400
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = ()
    generates: bool = True
    beams: int = 1
    batch: int = 32
    train: TrainOptions = field(default_factory=lambda: TrainOptions(save_every=0, dtype="float32"))

    def __post_init__(self) -> None:
        require(bool(self.rows), f"recipe {self.name} has no rows; give [[rows]] with a regime.")
        require(bool(self.seeds), f"recipe {self.name} has no seeds.")
        labels = [row.label for row in self.rows]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        require(twice is None, f"two rows of recipe {self.name} are called {twice!r}; give one of them a name.")

    def cells(self) -> Iterator[tuple[Row, int]]:
        """Every row with every seed: the first seed of all rows, then the next."""
        for seed in self.seeds:
            for row in self.rows:
                if not row.untrained or seed == self.seeds[0]:
                    yield row, seed


def read_recipe(file: str | Path) -> Recipe:
    """Parse a recipe. Raises OptionError naming the file and what is wrong in it."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"there is no recipe {path} to read ({error}).") from None
    try:
        return recipe_of(tomllib.loads(_filled(text)), path.stem)
    except (tomllib.TOMLDecodeError, BitloftError, TypeError) as error:
        raise OptionError(f"recipe {path}: {error}") from None


def recipe_of(table: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A recipe of a parsed table. Raises OptionError for a key that does not exist."""
    given = dict(table)
    shared, rows, training = given.pop("quantize", {}), given.pop("rows", []), given.pop("train", {})
    _known("a recipe", given, [f.name for f in fields(Recipe)])
    _known("[train]", training, {f.name for f in fields(TrainOptions)} - {"rank", "alpha", "start", "seed", "resume"})
    made = tuple(row for table in rows for row in _rows(table, shared))
    kept: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    for key in ("model", "task"):
        require(key in kept, f"it names no {key}.")
    training = {"save_every": 0, "dtype": "float32"} | _floats(training)
    return Recipe(**({"name": name} | kept), rows=made, train=TrainOptions(**training))


def _floats(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with floats where a number may be written without a point: ``epochs = 5``."""
    names = ("epochs", "lr", "alpha", "dropout", "warmup", "weight_decay")
    return {key: float(value) if key in names and isinstance(value, int) else value for key, value in table.items()}


def _rows(table: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[Row]:
    """One row for each choice of the values that are lists."""
    _known("[[rows]]", table, [f.name for f in fields(Row)])
    own = {**shared, **table.get("quantize", {})}
    plain = {key: value for key, value in table.items() if key != "quantize"}
    several = {key: value if isinstance(value, list) else [value] for key, value in plain.items()}
    for chosen in itertools.product(*several.values()):
        settings = dict(zip(several, chosen, strict=True))
        yield Row(**_floats(settings), quantize={} if settings.get("regime") in FLOAT else own)


def _known(where: str, given: Mapping[str, Any], names: Any) -> None:
    for key in given:
        require(key in names, f"{where} has no key {key!r}; it takes {', '.join(sorted(names))}.")


def _filled(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        require(found is not None, f"the variable {match[1]} is not set.")
        return str(found).replace("\\", "\\\\").replace('"', '\\"')

    lines = (
        line if line.lstrip().startswith("#") else re.sub(r"\$\{(\w+)\}", value, line) for line in text.split("\n")
    )
    return "\n".join(lines)
