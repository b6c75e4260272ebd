"""Second moments of the inputs of chosen modules, gathered by hooks while a block runs; saved, and read back.

    S = mean over tokens of x x^T      one per distinct input: q, k, v read the same tensor, gate and up too

Positions that are padding do not count. A mixture's experts have a moment each, over the tokens routed to them. On
disk a block's moments are one safetensors file, each distinct input once, with the fingerprint of what they were
measured on; a file with another fingerprint is refused, never used.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from bitloft.calibrate.blocks import replaced
from bitloft.checkpoint import read_header, read_tensors, replace_tensors
from bitloft.errors import CheckpointError
from bitloft.modules.experts import QuantExperts
from bitloft.solvers import Statistics


class Gatherer:
    """Moments of the modules ``names`` of one block. Use ``hooked`` around forwards, then ``statistics``."""

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        """``names``: matrix name as solvers know it -> kind; of experts the parameter's path."""
        self.model, self.names = model, names
        self.sums: dict[str, Float[Tensor, "columns columns"]] = {}
        self.tokens: dict[str, int] = {}
        self.leader: dict[str, str] = {}
        self.masks: Sequence[Bool[Tensor, "_ _"]] = ()
        self._seen: list[tuple[Tensor, str]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Gather from every forward inside."""
        handles = []
        experts: dict[str, QuantExperts] = {}
        for name, kind in self.names.items():
            if kind == "experts":
                experts |= self._watched(name.rpartition(".")[0])
            elif kind != "embedding":
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(self._hook(name)))
        try:
            with replaced(self.model, experts):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, masks: Sequence[Bool[Tensor, "_ _"]]) -> None:
        """Say that another batch comes, and which of its positions are text."""
        self.masks, self._seen = masks, []

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            for tensor, leader in self._seen:
                if tensor is x and self.leader.get(name, leader) == leader:
                    self.leader[name] = leader
                    return
            self._seen.append((x, name))
            self.leader.setdefault(name, name)
            self._add(name, x)

        return note

    def _watched(self, path: str) -> dict[str, QuantExperts]:
        """The experts at ``path`` as a module that computes expert by expert, noting what each projection reads."""
        module = QuantExperts(self.model.get_submodule(path))
        project = module._project

        def note(leaf: str, expert: int, x: Tensor) -> Tensor:
            self.leader.setdefault(f"{path}.{leaf}.{expert}", f"{path}.{leaf}.{expert}")
            self._add(f"{path}.{leaf}.{expert}", x)
            return project(leaf, expert, x)

        object.__setattr__(module, "_project", note)
        return {path: module}

    def _add(self, name: str, x: Float[Tensor, "*batch columns"]) -> None:
        mask = next((m for m in self.masks if m.shape == x.shape[:-1]), None)
        rows = (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).float()
        if name in self.sums:
            self.sums[name].addmm_(rows.T, rows)
        else:
            self.sums[name] = rows.T @ rows
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

    def statistics(self) -> dict[str, Statistics]:
        """By matrix name; modules that no token reached are left out."""
        means = {leader: self.sums[leader] / max(self.tokens[leader], 1) for leader in self.sums}
        return {n: Statistics(means[at], self.tokens[at]) for n, at in self.leader.items() if self.tokens[at]}


class Saved:
    """A directory of statistics: one file per block, ``identity`` being what they were measured on."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory, self.identity = directory, json.dumps(identity, sort_keys=True)

    def file(self, block: str) -> Path:
        return self.directory / f"{block or 'model'}.safetensors"

    def read(self, block: str) -> dict[str, Statistics] | None:
        """A block's statistics, None where there are none. Raises CheckpointError for those of something else."""
        file = self.file(block)
        if not file.is_file():
            return None
        facts = read_header(file).get("__metadata__", {})
        if facts.get("identity") != self.identity:
            raise CheckpointError(
                f"{file} was measured on something else ({facts.get('identity')}, now {self.identity}); give another "
                "directory for statistics, or remove this one."
            )
        moments, found = read_tensors(file), {}
        for name, (at, tokens) in json.loads(facts["inputs"]).items():
            found[name] = Statistics(moments[at], tokens)
        return found

    def write(self, block: str, statistics: Mapping[str, Statistics]) -> None:
        """Each distinct moment once; beside and renamed, so that a file is whole or absent."""
        moments: dict[str, Tensor] = {}
        inputs: dict[str, tuple[str, int]] = {}
        at_of: dict[int, str] = {}
        for name, one in statistics.items():
            if one.moment is not None:
                at = at_of.setdefault(id(one.moment), name)
                moments[at], inputs[name] = one.moment, (at, one.tokens)
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_tensors(self.file(block), moments, {"identity": self.identity, "inputs": json.dumps(inputs)})

    def gradients(self, measure: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The weights of outputs by module path: those of a file here, or measured and kept. Raises CheckpointError for
        a file that was measured on something else."""
        file = self.file("gradients")
        if self.read("gradients") is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            replace_tensors(file, dict(measure()), {"identity": self.identity, "inputs": "{}"})
        return read_tensors(file)


def read_moments(directory: str | Path) -> dict[str, Tensor]:
    """Module path -> second moment [in, in] of its inputs, from a directory of statistics, as ``compress`` takes them.

    Raises CheckpointError where the directory holds none.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        facts = read_header(file).get("__metadata__", {})
        if "inputs" not in facts:
            raise CheckpointError(f"{file} holds no statistics; give the directory of `bitloft quantize --statistics`.")
        moments = read_tensors(file)
        found |= {name: moments[at] for name, (at, _) in json.loads(facts["inputs"]).items()}
    if not found:
        raise CheckpointError(
            f"{directory} holds no statistics; make them with `bitloft quantize --solver calibrated --statistics DIR`."
        )
    return found
