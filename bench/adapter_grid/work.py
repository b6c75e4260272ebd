"""Bases, adapters and cells: each made once and kept below the working directory.

True bits are counted per value of the adapter that was trained, r * (m + n). The difference that a trained start leaves
has up to twice that rank in its file: what is asked of compress, and what it says, are converted.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import harness

from adapter_grid.loose import LOOSE, joint, loose
from adapter_grid.plan import BOTH, JOINT, Setting, Way
from bitloft.adapters import read_adapter
from bitloft.compress import compress
from bitloft.errors import OptionError
from bitloft.quantize import quantize
from bitloft.sensitivity import Moments

Cell = dict[str, Any]


class Family(Protocol):
    """What is trained and judged the same way: decoders by the loss per token, encoders by the loss per row."""

    def source(self, task: str) -> Path: ...
    def data(self, task: str, which: str) -> Path: ...
    def train(self, base: Path, setting: Setting, out: Path) -> None: ...
    def loss(self, base: Path, setting: Setting, adapter: Path | None) -> dict[str, Any]: ...
    def moments(self, base: Path, setting: Setting) -> Moments: ...
    def base_settings(self, base: str, rank: int) -> dict[str, Any]: ...


@dataclass
class Work:
    """``bases`` names packed bases that exist already; other names are number formats, quantized here."""

    directory: Path
    cells: harness.Cells
    family: Callable[[str], Family]
    bases: Mapping[str, Path] = field(default_factory=dict)
    start_rank: int = 16
    _moments: tuple[Setting, Moments] | None = None

    def base(self, setting: Setting) -> Path:
        if setting.base in self.bases:
            return self.bases[setting.base]
        source = self.family(setting.task).source(setting.task)
        out = self.directory / "bases" / f"{source.name}-{setting.base.replace(':', '_')}"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            quantize(source, out, **self.family(setting.task).base_settings(setting.base, self.start_rank))
        return out

    def adapter(self, setting: Setting) -> Path:
        out = self.directory / "adapters" / setting.name
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            self.family(setting.task).train(self.base(setting), setting, out)
        return out

    def alone(self, setting: Setting) -> Cell:
        """The base without an adapter."""
        nothing = {"true_bits": 0.0, "error": 1.0}
        return self._cell(setting.alone, Way("base"), lambda: nothing | self._loss(setting, None))

    def full(self, setting: Setting) -> Cell:
        """The adapter as it was trained."""

        def measure() -> Cell:
            source = self.adapter(setting)
            size = sum(file.stat().st_size for file in source.glob("adapter_*"))
            return {
                "true_bits": 8 * size / trained_values(source, setting),
                "error": 0.0,
                **self._loss(setting, source),
            }

        return self._cell(setting, Way("full"), measure)

    def packed(self, setting: Setting, way: Way, *, judged: bool = True) -> Cell:
        """The cell of one way; a size below the floor of the files is a cell that says so. ``judged``: with a loss."""
        return self._cell(setting, way, lambda: self.measured(setting, way, judged=judged), judged=judged)

    def measured(self, setting: Setting, way: Way, *, judged: bool) -> Cell:
        """What ``packed`` keeps, measured now whether or not it is known."""
        out = self._room(setting)
        try:
            found = self._pack(setting, way, out)
        except OptionError as error:
            return {"skipped": str(error)}
        found |= self._loss(setting, out) if judged else {}
        shutil.rmtree(out)
        return found

    def joint(self, together: Sequence[Setting], rank: int) -> list[Cell]:
        """Joint diagonalization of a set of adapters of one base: a cell for each."""
        way = Way(JOINT, f"rank {rank} over {len(together)} adapters")
        keys = [self.key(setting, way) for setting in together]
        if any(self.cells.find(key) is None for key in keys):
            rooms = [self._room(setting) for setting in together]
            made = joint([self.adapter(setting) for setting in together], rooms, rank)
            for setting, room, found in zip(together, rooms, made, strict=True):
                self._cell(setting, way, lambda s=setting, r=room, f=found: f | self._loss(s, r))  # type: ignore[misc]
                shutil.rmtree(room)
        return [self.cells.get(key, dict) for key in keys]

    def key(self, setting: Setting, way: Way, judged: bool = True) -> Cell:
        return setting.key(way.method, way.asked) | {"judged": judged}

    def _cell(self, setting: Setting, way: Way, measure: Callable[[], Cell], judged: bool = True) -> Cell:
        effort = {"learning_rate": setting.effort.learning_rate, "length": setting.effort.length}
        about = {"settings": way.settings | effort | {"moments": way.moments}, "commit": harness.commit()}
        return self.cells.get(self.key(setting, way, judged), lambda: measure() | about)

    def _room(self, setting: Setting) -> Path:
        out = self.directory / "packed" / setting.name
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        return out

    def _pack(self, setting: Setting, way: Way, out: Path) -> Cell:
        source = self.adapter(setting)
        if way.method in LOOSE:
            return loose(source, out, way, trained_values(source, setting))
        share = trained_values(source, setting) / read_adapter(source).values
        given = way.settings | ({"bits": way.settings["bits"] * share} if "bits" in way.settings else {})
        if "distill" in given:
            family = self.family(setting.task)
            given |= {"base": self.base(setting), "data": family.data(setting.task, "train")}
        if way.moments:
            found = self._moments_of(setting)
            given |= {"moments": found.inputs} | ({"gradients": found.outputs} if way.moments == BOTH else {})
        report = compress(source, out, **given)
        bits = {"true_bits": report.true_bits / share, "payload_bits": report.payload_bits / share}
        return {**bits, "error": report.error, "weighed_error": report.weighed_error}

    def _moments_of(self, setting: Setting) -> Moments:
        """They belong to base and task; those of the last setting are kept."""
        wanted = replace(setting, rank=0, seed=0)
        if self._moments is None or self._moments[0] != wanted:
            self._moments = wanted, self.family(setting.task).moments(self.base(setting), setting)
        return self._moments[1]

    def _loss(self, setting: Setting, adapter: Path | None) -> dict[str, Any]:
        return self.family(setting.task).loss(self.base(setting), setting, adapter)


def trained_values(source: Path, setting: Setting) -> int:
    """r * (m + n) over the modules of an adapter, r being the rank that was trained."""
    return sum(setting.rank * (pair.a.shape[1] + pair.b.shape[0]) for pair in read_adapter(source).pairs)
