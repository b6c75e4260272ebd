"""The calibrated run: block by block, gather, solve, write, and go on with what was written.

    for each block:   S of its inputs, from activations that passed the quantized blocks before it
                      each of its matrices solved by the stream's own step, and written to its place
                      the block run once more with what is stored, for the inputs of the next block

One block and its statistics are in memory, and the activations of the calibration text. An interrupted run goes on: for
a block that the journal has, the stored weights are read back and only the last of the three lines is done. Linears
outside of all blocks (an output head) come last, under what they read from the finished model.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitloft.calibrate.blocks import Stack, stacks_of
from bitloft.calibrate.gradients import output_weights
from bitloft.calibrate.replay import Replay, Whole, linked, reproduces, trace
from bitloft.calibrate.statistics import Gatherer, Saved
from bitloft.calibrate.text import Batch, read_batches
from bitloft.errors import OptionError
from bitloft.integrations.body import Body
from bitloft.integrations.packing import dense_of
from bitloft.integrations.source import Source
from bitloft.journal import Journal
from bitloft.options import QuantizeOptions
from bitloft.slots import Slots
from bitloft.solvers import Statistics
from bitloft.stream import Clock, Plan, Progress, Spread, Step, copy_rest, in_turn, limited

OUTSIDE = ""  # the name of what is in no block


@dataclass
class Calibration:
    """What was gathered. ``way`` says how: block by block, or why the whole model had to be in memory. ``gathered`` and
    ``reused`` count blocks of this run. (A matrix that no token reached has 0 tokens in its own report.) ``seconds``
    are this run's by stage: ``gradients``, ``gather``, ``solve`` (with reading and writing) and ``advance``."""

    text: str
    sequences: int
    tokens: int
    way: str
    gathered: int = 0
    reused: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of what is inside to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def text_identity(source: Source, options: QuantizeOptions) -> dict[str, Any]:
    """What statistics depend on, but for how the blocks before were quantized."""
    text = Path(str(options.calibrate))
    if not text.is_file():
        raise OptionError(f"calibrate is {text}, which is no file; give a .txt or .jsonl file.")
    found = {"source": source.fingerprint(), "text": hashlib.sha256(text.read_bytes()).hexdigest()}
    return found | {"samples": options.samples, "length": options.calibrate_length}


def run_calibrated(
    source: Source,
    options: QuantizeOptions,
    plan: Plan,
    slots: Slots,
    journal: Journal,
    *,
    threads: int,
    progress: Progress | None,
    spread: Spread = in_turn,
) -> Calibration:
    """Do what the journal does not yet hold, block by block, under statistics of the text ``options.calibrate``.

    Statistics are read from ``options.statistics`` where it has them, and written there where not (without it, to the
    run's own work directory). ``spread`` solves the matrices of a block, which are independent.
    Raises OptionError for a model that cannot be run, DataError for a text too short.
    """
    identity = text_identity(source, options)
    directory = options.statistics and Path(options.statistics)
    saved = Saved(directory or journal.directory.parent / "statistics", identity)
    with limited(threads), torch.no_grad():
        body = Body(source)
        job = _Job(body, plan, slots, journal, saved, Clock(plan, journal, progress), spread)
        job.batches = read_batches(
            str(options.calibrate), body.model, source.tokenizer,
            samples=options.samples, length=options.calibrate_length,
        )  # fmt: skip
        report = job.run(Path(str(options.calibrate)).name, source if options.fisher else None)
    copy_rest(plan, slots, journal)
    return report


@dataclass
class _Job:
    body: Body
    plan: Plan
    slots: Slots
    journal: Journal
    saved: Saved
    clock: Clock
    spread: Spread
    batches: Sequence[Batch] = ()
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # module -> what its outputs weigh

    def run(self, text: str, weighed: Source | None) -> Calibration:
        """``weighed``: the source of gradients, None to count all outputs alike."""
        walker, stacks, way = walker_of(self.body, self.batches)
        rows = sum(len(batch.inputs["input_ids"]) for batch in self.batches)
        self.report = Calibration(text, rows, sum(batch.tokens for batch in self.batches), way)
        if weighed is not None:
            with self.report.timed("gradients"):
                self.rows = self.saved.gradients(lambda: output_weights(weighed, self.batches))
        for stack in stacks:
            walker.capture(self.batches, stack)
            for at, block in enumerate(stack.blocks):
                self._block(walker, at, block)
        inside = tuple(f"{block}." for stack in stacks for block in stack.blocks)
        outside = [name for name in self.plan.steps if not name.startswith(inside)]
        if outside:
            with self._solving(OUTSIDE, outside) as gatherer:
                if gatherer is not None:
                    walker.finish(self.batches, lambda number: gatherer.begin(self.batches[number].masks))
        return self.report

    def _steps(self, block: str) -> list[str]:
        """The steps of a block."""
        return [name for name in self.plan.steps if name.startswith(f"{block}.")]

    def _block(self, walker: Replay | Whole, at: int, block: str) -> None:
        """One block: gather and solve what is not done, then go on with what is stored."""
        self.body.fill([] if self.body.resident else self.body.within(block))
        steps = self._steps(block)
        with self._solving(block, steps) as gatherer:
            if gatherer is not None:
                walker.gather(at, lambda number: gatherer.begin(self.batches[number].masks))
        for name in steps:
            self._put_stored(self.plan.steps[name])
        with self.report.timed("advance"):
            walker.advance(at)
        self.body.drop(block)

    @contextmanager
    def _solving(self, block: str, steps: Sequence[str]) -> Iterator[Gatherer | None]:
        """Gather inside, where statistics are missing; solve on leaving."""
        kinds = {name: stored.kind for name, stored in self.plan.quantizer.quantization_config.stored().items()}
        wanted = {m.name: kinds[m.name] for name in steps for m in self.plan.steps[name].matrices}
        todo = [name for name in steps if name not in self.journal.done]
        known = self.saved.read(block) if todo else {}
        if known is None:
            gatherer = Gatherer(self.body.model, wanted)
            with gatherer.hooked(), self.report.timed("gather"):
                yield gatherer
            known = gatherer.statistics()
            self.saved.write(block, known)
            self.report.gathered += 1
        else:
            yield None
            self.report.reused += bool(todo)
        quantizer = self.plan.quantizer
        quantizer.statistics = Known(known, self.rows)
        with self.report.timed("solve"):
            for name, record in self.spread(self.plan, self.slots, todo):
                self.journal.add(name, record)
                self.clock.tick(name)
        quantizer.statistics = {}

    def _put_stored(self, step: Step) -> None:
        """Give the dense model what the output holds of a step's matrices."""
        model = self.plan.skeleton.model
        kinds = self.plan.quantizer.quantization_config.stored()
        for matrix in step.matrices:
            tensors = {name: self.slots.places[name].read() for name in matrix.outputs}
            self.body.put(matrix.target, dense_of(model, matrix.name, kinds[matrix.name].kind, tensors))


def walker_of(body: Body, batches: Sequence[Batch]) -> tuple[Replay | Whole, list[Stack], str]:
    """How the blocks of a model are run, found out by one real forward of one sequence; and how to say it.

    Everything outside of the blocks is filled.
    """
    stacks = stacks_of(body.model)
    body.fill_all_but([block for stack in stacks for block in stack.blocks])
    probe = Batch({key: value[:1] for key, value in batches[0].inputs.items()})
    traced = trace(body, stacks, probe)
    found = linked(traced, stacks) if stacks else "its class names no blocks (_no_split_modules)"
    why = found if isinstance(found, str) else reproduces(body, traced, found, probe)
    if why is None and not isinstance(found, str):
        forms = {name: output for name, _, output in traced.calls}
        return Replay(body, found, forms), found, "block by block"
    counts = Counter(name for name, _, _ in traced.calls)
    stacks = [Stack(tuple(b for b in stack.blocks if counts[b])) for stack in stacks]
    return Whole(body, batches, counts), stacks, f"whole model in memory: {why}"


class Known(dict[str, Statistics]):
    """Statistics by matrix, with the weights of outputs where there are any; empty ones for a matrix that no token
    reached, such as an expert that no token chose."""

    def __init__(self, statistics: Mapping[str, Statistics], rows: Mapping[str, Tensor]) -> None:
        super().__init__(statistics)
        self.rows = rows

    def get(self, name: str, default: Any = None) -> Any:
        return replace(super().get(name, Statistics(None)), rows=self.rows.get(name))
