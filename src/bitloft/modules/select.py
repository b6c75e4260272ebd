"""Which modules of a model are quantized, as what kind, and why each of the others is left alone.

Kinds: ``linear`` (nn.Linear), ``conv1d`` (GPT-2's transposed linear), ``embedding`` (a token table, when asked),
``experts`` (a fused 3-D parameter, named by its own path). A module is recognized by what it is, not by its model's
name: tables of names per architecture age with every release of transformers, and this needs no import of it.

Left alone unless asked: token tables (``embeddings``) and the output head (``head``). Left alone always: what lies
outside the base model (task heads, as LoftQ leaves them), poolers, routers of a mixture, what the checkpoint does not
hold (a classifier that the class makes fresh), subclasses with a forward of their own, convolutions, norms.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitloft.errors import OptionError
from bitloft.modules.experts import projections
from bitloft.options import QuantizeOptions
from bitloft.patterns import matches

THIN = 8  # a matrix with fewer rows or columns is left
HEADS = ("pooler", "classifier", "classification_head", "score", "qa_outputs")  # task heads, by their usual names


@dataclass(frozen=True)
class Selection:
    """``chosen``: path -> kind, in model order; for experts the path of the parameter. ``left``: path -> reason, for
    every other module that holds a weight, those included that share a chosen table."""

    chosen: dict[str, str]
    left: dict[str, str]


def select_modules(model: nn.Module, options: QuantizeOptions, available: Container[str] | None = None) -> Selection:
    """Choose by ``options`` (target, skip, embeddings, head); the model may be on the meta device.

    ``available`` names the weights that the checkpoint holds, as the model names them; None stands for all. Patterns
    match a whole path or its end after a dot; ``target`` narrows linears and experts, tables and heads have options of
    their own. Raises OptionError for a pattern that matches nothing, for a table asked for without the head that is
    tied to it (or the other way round), and where nothing is left to quantize.
    """
    facts = _Facts(model, options, available)
    kinds = dict(facts.kinds())
    for field, patterns in (("target", options.target), ("skip", options.skip)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in kinds):
                raise OptionError(
                    f"{field} pattern {pattern!r} matches none of the {len(kinds)} modules that can be quantized."
                )
    left = {name: reason for name in kinds if (reason := facts.reason(name, kinds[name])) is not None}
    chosen = {name: kind for name, kind in kinds.items() if name not in left}
    tied = {name: owner for name, owner in facts.tied.items() if owner in chosen}
    left |= {name: f"tied to {owner}, packed with it" for name, owner in tied.items()}
    for name in tied:
        chosen.pop(name, None)
    if not chosen:
        raise OptionError("no module is left to quantize; widen target or narrow skip.")
    covered = (
        {name.rpartition(".")[0] for name, kind in kinds.items() if kind == "experts"} | kinds.keys() | left.keys()
    )
    left |= {name: _other(module) for name, module in facts.weighted() if name not in covered}
    return Selection(chosen, left)


def _other(module: nn.Module) -> str:
    """The reason for a module that no kind covers."""
    name = type(module).__name__
    if any(p.dim() > 2 for p in module.parameters(recurse=False)) and "Expert" in name:
        return f"{name} is kept in 16 bit: its experts do not follow transformers' experts interface"
    return f"{name} is kept in 16 bit"


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Module -> the module whose weight it shares, as the model declares it (transformers' all_tied_weights_keys)."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = ((a.rpartition("."), b.rpartition(".")) for a, b in declared.items())
    return {a[0]: b[0] for a, b in pairs if a[2] == b[2] == "weight"}


class _Facts:
    """What is asked of a model for every module: its heads, tables, ties, and what its checkpoint holds."""

    def __init__(self, model: nn.Module, options: QuantizeOptions, available: Container[str] | None) -> None:
        self.model, self.options, self.available = model, options, available
        self.tied = tied_modules(model)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.heads = set(self._asked([model], "get_output_embeddings"))
        self.tables = set(self._asked(model.modules(), "get_input_embeddings"))
        self.tables |= {self.tied[name] for name in self.tables & self.tied.keys()}
        prefix = getattr(model, "base_model_prefix", "")
        self.base = f"{prefix}." if prefix and hasattr(model, prefix) else ""

    def _asked(self, modules: Any, method: str) -> Iterator[str]:
        for module in modules:
            if callable(ask := getattr(module, method, None)):
                try:
                    found = ask()
                except (RuntimeError, AttributeError):  # what transformers raises for a model without the like
                    continue
                if id(found) in self.names:
                    yield self.names[id(found)]

    def weighted(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module that holds parameters of its own."""
        for name, module in self.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                yield name, module

    def kinds(self) -> Iterator[tuple[str, str]]:
        """Path and kind of everything that could be quantized, in model order."""
        for name, module in self.weighted():
            yield from ((f"{name}.{leaf}", "experts") for leaf in projections(module))
            if type(module) is nn.Linear:
                yield name, "linear"
            elif _is_conv1d(module):
                yield name, "conv1d"
            elif name in self.tables and _is_table(module):
                yield name, "embedding"

    def reason(self, name: str, kind: str) -> str | None:
        """Why a module of some kind is left in 16 bit; None for one to quantize."""
        options, one_matrix = self.options, self.group(name)
        if kind == "embedding" and not options.embeddings:
            return f"{type(self.model.get_submodule(name)).__name__} is kept in 16 bit"
        if name in self.heads and not options.head:
            self._untorn(one_matrix)
            return "output head is kept in 16 bit"
        if any(matches(member, pattern) for member in one_matrix for pattern in options.skip):
            return "matches skip"
        if kind == "embedding" or name in self.heads:
            self._untorn(one_matrix)
            return self._unreadable(one_matrix) or self._absent(one_matrix)
        if not name.startswith(self.base) or any(part in HEADS for part in name.split(".")):
            return "task heads and poolers are kept in 16 bit"
        if options.target and not any(matches(name, pattern) for pattern in options.target):
            return "does not match target"
        return self._unfit(name, kind) or self._absent([name])

    def _unfit(self, name: str, kind: str) -> str | None:
        """Routers of a mixture decide which expert runs, and a thin matrix has next to no bytes to save."""
        parent, _, leaf = name.rpartition(".")
        if (
            kind == "linear"
            and leaf.endswith(("gate", "router"))
            and hasattr(self.model.get_submodule(parent), "experts")
        ):
            return "routers are kept in 16 bit"
        if kind != "experts" and min(shape := self.model.get_submodule(name).get_parameter("weight").shape) < THIN:
            return f"{shape[0]} x {shape[1]} is too thin: packing saves nothing"
        return None

    def group(self, name: str) -> list[str]:
        """The modules that share one matrix with ``name``: the owner, then those tied to it."""
        owner = self.tied.get(name, name)
        return [owner, *(other for other, of in self.tied.items() if of == owner)]

    def _untorn(self, one_matrix: list[str]) -> None:
        """Refuse to pack half of a matrix that is a table and the head."""
        both = self.heads & {*one_matrix} and self.tables & {*one_matrix}
        if both and self.options.embeddings != self.options.head:
            raise OptionError(
                f"{one_matrix[0]} and the output head are one matrix in this model; ask for both (embeddings and head) "
                "or for none."
            )

    def _unreadable(self, one_matrix: list[str]) -> str | None:
        modules = [self.model.get_submodule(name) for name in one_matrix]
        strange = next((m for m in modules[1:] if type(m) is not nn.Linear and not _is_table(m)), None)
        if strange is None and (len(modules) == 1 or _is_table(modules[0])):
            return None
        return f"shares its matrix with a {type(strange or modules[0]).__name__}, which cannot read a packed one"

    def _absent(self, names: list[str]) -> str | None:
        held = self.available is None or any(n in self.available or f"{n}.weight" in self.available for n in names)
        return None if held else "not in the checkpoint: this model class makes it fresh"


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_table(module: nn.Module) -> bool:
    """A plain table, or one whose only addition is a scale; others have a forward that a packed table would miss."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and scaled)
