"""Which format, solver, rank and scaling each module gets: options with patterns in, one plan per module out.

Precedence: the first of ``rules`` that matches; else ``first_layers`` for a module of the first layers; else the
``format``. A pattern is a shell pattern over the whole module path or its end after a dot (``q_proj``, ``layers.0.*``).
One that matches nothing is refused: it is a misspelling, and a run that ignored it would be hours of wrong settings.

A plan is all that a solver needs beside the tensor. The alternative, options that are looked up by name inside each
solver, would let two callers resolve the same name differently.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitloft.errors import CheckpointError, OptionError
from bitloft.formats import Format
from bitloft.options import QuantizeOptions
from bitloft.patterns import first_layers_of, matches, split_rule

KINDS = ("linear", "conv1d", "embedding", "experts")
ROTATED = ("linear", "conv1d")  # what a rotation is for: a table has no inputs, experts share theirs with a router


@dataclass(frozen=True)
class ModulePlan:
    """How one matrix is quantized and repaired. ``alpha`` None means the rank: scaling 1, sqrt(rank) with rslora.
    ``rotated``: codes and start stand for rotated inputs (``solvers.rotation``).

    Raises OptionError for qalora in a format that its adapters cannot merge into, and for the calibrated solver in one
    whose codes cannot be chosen column by column.
    """

    format: str
    solver: str
    rank: int
    alpha: float | None = None
    rslora: bool = False
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.solver == "qalora" and not Format.parse(self.format).shift:
            raise OptionError(
                f"qalora merges adapters into a shift per group, which {self.format} does not store; use a format "
                "with +shift, such as uniform4:32+shift."
            )
        fmt = Format.parse(self.format)
        if self.solver == "calibrated" and fmt.family == "trellis" and not fmt.by_column:
            raise OptionError(
                f"calibrated chooses codes column by column, and those of {self.format} go along rows; use a trellis "
                f"with groups, such as trellis{fmt.bits}:64."
            )

    @property
    def start_rank(self) -> int:
        """Rank of the start that is stored: other solvers leave it zero."""
        return self.rank if self.solver in ("loftq", "calibrated") else 0

    @property
    def scaling(self) -> float:
        """s0 of W ~ Q + s0 * B0 @ A0: alpha / r, or alpha / sqrt(r) with rslora; 0 without a start."""
        if not self.start_rank:
            return 0.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)


def plan_of(options: QuantizeOptions) -> ModulePlan:
    """The plan of a module that no pattern names."""
    return ModulePlan(options.format, options.solver, options.rank, options.alpha, options.rslora)


def layer_of(name: str) -> int | None:
    """Position of a module's layer in its stack: the first number in its path (``model.layers.3.mlp.experts.5``: 3).

    None outside of a stack, such as embeddings and heads. An encoder-decoder's stacks are counted each from 0.
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def resolve(
    names: Iterable[str],
    options: QuantizeOptions,
    layer_of: Callable[[str], int | None] = layer_of,
    formats: Mapping[str, str] | None = None,
) -> dict[str, ModulePlan]:
    """One plan per module, in the order of ``names``. ``formats`` (from ``solvers.allocate``) overrules the options'.

    Raises OptionError for a pattern that matches none of the names, and for ``first_layers`` where no module is in a
    layer.
    """
    names = tuple(names)
    rules = _parsed("rules", options.rules, names)
    ranks = _parsed("rank_for", options.rank_for, names)
    alphas = _parsed("alpha_for", options.alpha_for, names)
    count, leading = first_layers_of(options.first_layers)
    if count and all(layer_of(name) is None for name in names):
        raise OptionError(f"first_layers {options.first_layers!r} names layers, but no module's path has a number.")
    plans = {}
    for name in names:
        layer = layer_of(name)
        rest = leading if layer is not None and layer < count else options.format
        plans[name] = ModulePlan(
            format=(formats or {}).get(name) or _first(rules, name) or rest,
            solver=options.solver,
            rank=int(float(_first(ranks, name) or options.rank)),
            alpha=float(given) if (given := _first(alphas, name)) else options.alpha,
            rslora=options.rslora,
        )
    return plans


def _parsed(field: str, rules: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    parsed = [split_rule(field, rule) for rule in rules]
    for pattern, _ in parsed:
        if not any(matches(name, pattern) for name in names):
            raise OptionError(f"{field} pattern {pattern!r} matches none of the {len(names)} modules to quantize.")
    return parsed


def _first(rules: Sequence[tuple[str, str]], name: str) -> str | None:
    return next((value for pattern, value in rules if matches(name, pattern)), None)


@dataclass(frozen=True)
class StoredModule:
    """What config.json says of one packed module: enough to allocate its tensors before any is read, and whether they
    stand for rotated inputs."""

    format: str
    rank: int
    scaling: float
    kind: str
    start_format: str
    rotated: bool = False

    @classmethod
    def of(cls, plan: ModulePlan, options: QuantizeOptions, kind: str = "linear") -> "StoredModule":
        """Raises OptionError for a table in a format that it cannot be read from row by row."""
        if kind == "embedding" and Format.parse(plan.format).by_column:
            raise OptionError(
                f"a token table is read row by row, and {plan.format} keeps columns together; give tables another "
                "format by rules, such as *embed*=lm4:64."
            )
        return cls(plan.format, plan.start_rank, plan.scaling, kind, options.start_format, plan.rotated)

    @classmethod
    def read(cls, entry: Any, options: QuantizeOptions, name: str) -> "StoredModule":
        """An entry of ``quantization_config.modules``: a dict, or a text that is the format alone (older files).

        What an entry leaves out is the options' default. Raises CheckpointError for anything else.
        """
        default = cls.of(plan_of(options), options)
        given = {"format": entry} if isinstance(entry, str) else entry
        known = {"format": str, "rank": int, "scaling": (int, float), "kind": str, "start_format": str, "rotated": bool}
        if not isinstance(given, Mapping) or any(
            key not in known
            or not isinstance(value, known[key])  # type: ignore[arg-type]
            or isinstance(value, bool) != (key == "rotated")
            for key, value in given.items()
        ):
            raise CheckpointError(f"quantization_config says {entry!r} of module {name}; it is damaged or newer.")
        found = cls(**{**default.__dict__, **given})
        if found.kind not in KINDS:
            raise CheckpointError(f"quantization_config gives module {name} the unknown kind {found.kind!r}.")
        return found

    def entry(self, options: QuantizeOptions) -> str | dict[str, Any]:
        """The shortest entry that ``read`` understands: fields that differ from the options' defaults, and the format;
        the format alone is a plain text."""
        default = StoredModule.of(plan_of(options), options)
        changed = {k: v for k, v in self.__dict__.items() if k != "format" and v != getattr(default, k)}
        return {"format": self.format} | changed if changed else self.format
