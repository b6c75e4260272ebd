"""From a plain adapter to the blocks of a packed one: the method's solver, module by module, and the budget of bytes.

    true bits = 8 * (bytes of the manifest and of every file it lists) / sum of r * (m + n)

A budget of true bits covers names, sums and config as well, and their size depends on what is allocated (the table is
compressed). So the directory is serialized in memory, measured, and the rest of the budget allocated again, until what
is left is less than one component. The budget is never exceeded. A quality is met the same way, by bisection over
budgets: errors are measured from the blocks as they will be stored, never predicted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bitloft.adapter_config import kept
from bitloft.adapters import Adapter, LoraPair, PackedBlock, PackedModule, serialize
from bitloft.errors import AdapterError, BitloftError, OptionError
from bitloft.options import CompressOptions
from bitloft.solvers import baselines, waterfill
from bitloft.solvers.adapter import Components, Trained, components, product_error, root_of
from bitloft.solvers.loraquant import loraquant, loraquant_unsplit
from bitloft.solvers.refine import refined

Progress = Callable[[int, int, str], None]
Blocks = tuple[PackedBlock, ...]
ROUNDS = 8  # of allocating and measuring; two or three are enough
OUT_DAMPING = 0.1  # of output gradients: a few thousand tokens leave their rarer directions open (docs/decisions.md)
RESERVE = 2  # bytes a module: an error of three digits, compressed
HALVINGS = 10  # of the bracket between half and all of the size that predicted errors ask for: 0.05 % of it is left


@dataclass(frozen=True)
class Distilled:
    """A distillation at constant size. Losses are nats per token on ``tokens`` held-out targets: of the base with the
    adapter as trained, packed, and packed after distilling. ``kept`` says whether the last is what was written: it is
    only where the loss fell."""

    steps: int
    codes: bool
    loss_full: float
    loss_before: float
    loss_after: float
    tokens: int
    kept: bool
    seconds: float


@dataclass(frozen=True)
class Metric:
    """By module path: second moments of ``inputs`` [in, in], and of the loss's gradients by ``outputs`` [out, out]."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return "+".join(name for name, found in (("inputs", self.inputs), ("outputs", self.outputs)) if found)

    def of(self, module: str) -> tuple[Tensor | None, Tensor | None]:
        return self.inputs.get(module), self.outputs.get(module)


class Packing:
    """One adapter on its way: its singular components, and the bytes that a choice of blocks would take."""

    def __init__(
        self,
        source: Adapter,
        options: CompressOptions,
        *,
        metric: Metric | None = None,
        mismatch: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.options, self.mismatch, self._progress = source, options, mismatch, progress
        self._errors: dict[tuple[Any, ...], float] = {}
        self._refined: dict[tuple[Any, ...], Blocks] = {}
        self.exact = [self._components(pair) for pair in source.pairs]
        self._metric, self._aims = metric.name if metric else "", self.exact
        if metric and self._metric:
            self._aims = [self._components(p, *metric.of(p.name)) for p in source.pairs]
        self.energy = sum(c.energy for c in self.exact)

    def _components(self, pair: LoraPair, moment: Tensor | None = None, gradient: Tensor | None = None) -> Components:
        for side, found, size in (("inputs", moment, pair.a.shape[1]), ("outputs", gradient, pair.b.shape[0])):
            if found is not None and found.shape[0] != size:
                raise OptionError(
                    f"the second moment of {pair.name}'s {side} has shape {tuple(found.shape)}; there are {size}."
                )
        root = None if moment is None else root_of(moment)
        out_root = None if gradient is None else root_of(gradient, OUT_DAMPING)
        try:
            return components(pair.a, pair.b, pair.scaling, root, out_root)
        except AdapterError as error:
            raise AdapterError(f"module {pair.name} of adapter {self.source.path}: {error}") from error

    @property
    def _reserve(self) -> int:
        """Bytes kept free for a distillation to come: codes keep their size, but errors and scales are then spelled
        otherwise in table and manifest."""
        return RESERVE * (len(self.source.pairs) + 8) if self.options.distill else 0

    def solve(self) -> tuple[list[PackedModule], list[str]]:
        """The modules in name order, and what the user must be told."""
        notes = [] if self.energy else [f"{self.source.path} changes nothing: every product is zero."]
        settings = self.options.settings
        if settings["name"] != "waterfill":
            return self.modules_of([self._other(i, settings) for i in self._each()]), notes
        coded = [waterfill.code(self._aims[i], str(settings["code"])) for i in self._each()]
        if "quality" in settings:
            return self._of_quality(coded, float(settings["quality"])), notes
        return self._of_bits(coded, float(settings["bits"]), notes)

    def _each(self) -> Iterator[int]:
        for i, pair in enumerate(self.source.pairs):
            yield i
            if self._progress is not None:
                self._progress(i + 1, len(self.source.pairs), pair.name)

    def _other(self, i: int, settings: Mapping[str, Any]) -> Blocks:
        """Blocks of module ``i`` by a method that has no budget."""
        exact, pair, name = self._aims[i], self.source.pairs[i], settings["name"]
        trained = Trained(pair.a, (pair.scaling * pair.b).T.contiguous())
        if name == "loraquant":
            ways = {"high": settings["high"], "ratio": settings["ratio"], "refine": self.options.refine}
            split = settings.get("split", "svd")
            return loraquant(exact, **ways) if split == "svd" else loraquant_unsplit(exact, trained, by=split, **ways)
        if name == "gptq":
            moment = None if exact.root is None else exact.root @ exact.root.T
            return baselines.gptq(trained, settings["high"], moment)
        if name == "truncate":
            rank = min(settings["rank"], exact.s.numel())
            return baselines.truncated(exact, trained, rank=rank, width=settings["width"])
        if name == "shrink":
            return baselines.shrunk(exact, settings["quality"])
        return baselines.sign(trained) if name == "sign" else baselines.rtn(trained, settings["high"])

    def _of_bits(
        self, coded: list[waterfill.Coded], bits: float, notes: list[str]
    ) -> tuple[list[PackedModule], list[str]]:
        limit = int(bits * self.source.values / 8) - self._reserve
        widths = waterfill.least(coded)
        best = self.modules_of([()] * len(coded)) if widths is None else self._packed(coded, widths)
        size = self._size(best)
        if size > limit:
            raise OptionError(self._below_floor(bits, best))
        room, seen = limit - size + payload_bytes(best), -1
        for _ in range(ROUNDS):
            widths, spent = waterfill.allocate(coded, room)
            if spent == seen:
                break
            modules, seen = self._packed(coded, widths), spent
            spare = limit - self._size(modules)
            if spare >= 0 and payload_bytes(modules) > payload_bytes(best):
                best = modules
            room = spent + spare
        if self.energy and payload_bytes(best) == waterfill.allocate(coded, 1 << 62)[1]:
            full = 8 * self._size(best) / self.source.values
            notes.append(f"every component is stored at 4 bits and takes {full:.3f} true bits of the {bits:g} allowed.")
        return best, notes

    def _of_quality(self, coded: list[waterfill.Coded], quality: float) -> list[PackedModule]:
        """The cheapest allocation whose measured error is at most ``quality``."""
        high = waterfill.allocate(coded, 1 << 62)[1]
        best = self._at(coded, high)
        if self.error(best) > quality:
            raise OptionError(
                f"no size keeps the error of {self.source.path} under {quality:g}: at 4 bits everywhere it is "
                f"{self.error(best):.3g}; ask for more than that, or keep the adapter as it is."
            )
        low, target = 0, quality * sum(c.energy for c in self._aims)
        top = high
        while top - low > 1:  # predicted errors are cheap: narrow down to a byte first
            middle = (low + top) // 2
            low, top = (low, middle) if waterfill.predicted(coded, middle) <= target else (middle, top)
        for bound in (top // 2, top + top // 8 + 64):
            modules = self._at(coded, min(bound, high))
            low, high, best = (low, bound, modules) if self.error(modules) <= quality else (bound, high, best)
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            modules = self._at(coded, middle)
            low, high, best = (low, middle, modules) if self.error(modules) <= quality else (middle, high, best)
        return best

    def _at(self, coded: list[waterfill.Coded], budget: int) -> list[PackedModule]:
        return self._packed(coded, waterfill.allocate(coded, budget)[0])

    def _packed(self, coded: list[waterfill.Coded], widths: Sequence[Tensor]) -> list[PackedModule]:
        blocks = waterfill.pack(coded, widths)
        keys = [(i, *w.tolist(), *(int(b.a.exponent) for b in blocks[i][:1])) for i, w in enumerate(widths)]
        if self.options.refine:
            for i, key in enumerate(keys):
                if key not in self._refined:
                    self._refined[key] = refined(self._aims[i], blocks[i])
            blocks = [self._refined[key] for key in keys]
        return self.modules_of(blocks, keys)

    def modules_of(self, blocks: Sequence[Blocks], keys: Sequence[tuple[Any, ...]] | None = None) -> list[PackedModule]:
        """Blocks with names, sizes and measured errors; ``keys`` tell equal choices apart, so each is measured once."""
        found = []
        for i, (pair, exact, parts) in enumerate(zip(self.source.pairs, self.exact, blocks, strict=True)):
            key = keys[i] if keys is not None else (i,)
            if key not in self._errors or keys is None:
                self._errors[key] = product_error(exact, parts) / exact.energy if exact.energy else 0.0
            rank, columns = pair.a.shape
            found.append(PackedModule(pair.name, columns, pair.b.shape[0], parts, rank, self._errors[key]))
        return found

    def error(self, modules: Sequence[PackedModule]) -> float:
        """Relative squared error of the whole adapter, in the plain norm."""
        lost = sum(m.error * c.energy for m, c in zip(modules, self.exact, strict=True))
        return lost / self.energy if self.energy else 0.0

    def weighed_error(self, modules: Sequence[PackedModule]) -> float | None:
        """The same in the metric of second moments, None without them."""
        if not self._metric:
            return None
        energy = sum(c.energy for c in self._aims)
        lost = sum(product_error(c, m.blocks) for m, c in zip(modules, self._aims, strict=True))
        return lost / energy if energy else 0.0

    def files(self, modules: Sequence[PackedModule]) -> dict[str, bytes]:
        """The packed directory's files as bytes."""
        source = self.source
        record = {
            "base": source.base,
            "source": source.source,
            "start": source.start,
            "method": self.options.settings | ({"metric": self._metric} if self._metric else {}),
            "values": source.values,
            "error": float(f"{self.error(modules):.3e}"),
        }
        if self.mismatch is not None:
            record["mismatch"] = self.mismatch
        try:
            return serialize(kept(source.config, [m.name for m in modules]), modules, record)
        except BitloftError as error:
            raise AdapterError(f"adapter {source.path} cannot be packed: {error}") from error

    def _size(self, modules: Sequence[PackedModule]) -> int:
        return sum(len(data) for data in self.files(modules).values())

    def _below_floor(self, bits: float, least: Sequence[PackedModule]) -> str:
        """The manifest records what was asked for, so the size of the floor includes the floor's own digits."""
        size, ticks = self._size(least) + self._reserve, 0
        while 8 * size > ticks * self.source.values / 10000:
            ticks = max(ticks + 1, -(-8 * size * 10000 // self.source.values))  # rounded up: asking for it must work
            self.options = replace(self.options, bits=ticks / 10000)
            size = self._size(least) + self._reserve
        floor = ticks / 10000
        return (
            f"{bits:g} true bits allow {int(bits * self.source.values / 8)} bytes for {self.source.path}, but names, "
            f"sums, config and one component take {size}; the least possible is {floor:.4f}."
        )


def payload_bytes(modules: Sequence[PackedModule]) -> int:
    """Bytes of codes, scales and zero points (the exponents are in the table)."""
    return sum(block_bytes(block) for module in modules for block in module.blocks)


def block_bytes(block: PackedBlock) -> int:
    return block.a.nbytes + block.bt.nbytes - block.a.exponent.element_size() - block.bt.exponent.element_size()
