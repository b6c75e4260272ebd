"""Quantizing as a stream: one matrix is read, solved and written to its place in the output, then the next.

The plan (which tensors, where in which file) follows from headers and config alone. What a step needs in memory is its
own matrix and the solver's work on it; the model is never whole anywhere. Steps are independent and each is solved
with the same number of threads, so their order, the number of processes and interruptions leave no trace in the bytes.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context, parent_process
from typing import Any

import torch
from torch import Tensor

from bitloft.errors import CheckpointError
from bitloft.float8 import Stored
from bitloft.integrations.skeleton import Reading, Skeleton, check_names, open_skeleton, specs_of
from bitloft.integrations.source import Source
from bitloft.integrations.transformers import BitloftConfig, BitloftQuantizer, register
from bitloft.journal import Journal
from bitloft.modules.parts import stored_names
from bitloft.options import QuantizeOptions
from bitloft.shards import Spec
from bitloft.slots import Slots, write
from bitloft.solvers import check_rank

# called with (done, total, what was done and how much is left) after each matrix
Progress = Callable[[int, int, str], None]
COPIES = "copies"  # the journal's name for everything that is not packed


@dataclass(frozen=True)
class Matrix:
    """One packed tensor of the model: its dense name and shape, and the names of what is stored of it."""

    name: str
    target: str
    format: str
    shape: tuple[int, ...]
    outputs: tuple[str, ...]

    @property
    def weights(self) -> int:
        return prod(self.shape)

    def is_start(self, output: str) -> bool:
        """True for a part of A0 or B0: ``name.a0...`` in a layer, ``name_a0...`` among experts."""
        return output.removeprefix(self.name)[1:].startswith(("a0", "b0"))


@dataclass(frozen=True)
class Step:
    """What is read together, and the matrices it gives; what else it gives stays dense."""

    reading: Reading
    matrices: tuple[Matrix, ...]

    @property
    def weights(self) -> int:
        return sum(matrix.weights for matrix in self.matrices)


@dataclass
class Plan:
    """Everything about a run that is known before a value is read; ``outputs`` in the order of the files."""

    skeleton: Skeleton
    quantizer: BitloftQuantizer
    left: dict[str, str]
    steps: dict[str, Step]
    copies: dict[str, Stored]
    outputs: dict[str, Spec]

    @property
    def measured(self) -> bool:
        """True where the solver wants statistics of the inputs, so that blocks must be solved in order."""
        options = self.quantizer.quantization_config.options
        return options.solver == "calibrated" and options.metric != "none"

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for step in self.steps.values() for matrix in step.matrices)


# Solves and writes steps of a plan: names to (name, record), in any order. ``in_turn`` here, ``fanout.fanned`` on Ray.
Spread = Callable[[Plan, Slots, Sequence[str]], Iterator[tuple[str, dict[str, Any]]]]


def make_plan(source: Source, options: QuantizeOptions) -> Plan:
    """Choose what is packed and name every output. Raises CheckpointError or OptionError for bad input."""
    register()
    skeleton = open_skeleton(source)
    model, dense = skeleton.model, skeleton.dense()
    quantizer = BitloftQuantizer(BitloftConfig(options.recorded()))
    quantizer.preprocess_model(model, checkpoint_files=source.files())
    left = quantizer.left | skeleton.dropped
    packed = specs_of(model.state_dict())
    matrices = {}
    for name, stored in quantizer.quantization_config.stored().items():
        target = name if name in dense else f"{name}.weight"
        if target not in dense:
            raise CheckpointError(f"{name} was chosen for quantization, but the checkpoint holds no weight of it.")
        held = stored_names(name, stored)
        outputs = tuple(key for key in packed if key in held)
        matrices[target] = Matrix(name, target, stored.format, dense[target].shape, outputs)
        check_rank(name, dense[target].shape[-2:], quantizer.plans[name])
    steps, copies, specs = _arrange(skeleton, matrices, packed)
    check_names(model, specs)
    return Plan(skeleton, quantizer, left, steps, copies, specs)


def _arrange(
    skeleton: Skeleton, matrices: dict[str, Matrix], packed: dict[str, Spec]
) -> tuple[dict[str, Step], dict[str, Stored], dict[str, Spec]]:
    """Steps, copies and the specs of all outputs, from what is read and what of it is packed."""
    reading_of = {target: reading for reading in skeleton.readings for target in reading.targets}
    owner = {output: matrix.target for matrix in matrices.values() for output in matrix.outputs}
    steps: dict[str, Step] = {}
    copies: dict[str, Stored] = {}
    specs: dict[str, Spec] = {}
    for name in packed:
        reading = reading_of.get(owner.get(name, name))
        if reading is None:  # a buffer that the checkpoint does not hold, or the other name of a tied tensor
            continue
        chosen = tuple(matrices[target] for target in reading.targets if target in matrices)
        if name in owner:
            specs[name] = packed[name]
        elif not chosen and reading.converter is not None:  # the checkpoint's own form, which loads by its own names
            copies |= {source: skeleton.tensors[source] for source in reading.sources}
            specs |= {source: skeleton.tensors[source].spec for source in reading.sources}
        elif chosen:
            specs[name] = reading.targets[name]
        else:
            copies[name] = skeleton.tensors[reading.sources[0]]
            specs[name] = copies[name].spec
        if chosen:
            steps.setdefault(chosen[0].name, Step(reading, chosen))
    return steps, copies, specs


def run(
    source: Source,
    options: QuantizeOptions,
    plan: Plan,
    slots: Slots,
    journal: Journal,
    *,
    jobs: int,
    threads: int,
    progress: Progress | None,
    spread: Spread | None = None,
) -> None:
    """Do what the journal does not yet hold, by ``jobs`` processes of ``threads`` threads each, or by ``spread``."""
    todo = [name for name in plan.steps if name not in journal.done]
    clock = Clock(plan, journal, progress)
    if spread is None and jobs > 1 and len(todo) > 1:
        workers = ProcessPoolExecutor(
            min(jobs, len(todo)),
            mp_context=get_context("spawn"),  # forking a process that has run torch's threads may hang
            initializer=_start_worker,
            initargs=(source, options, slots, threads),
        )
        try:
            waiting = {workers.submit(_work, name): name for name in todo}
            for finished in as_completed(waiting):
                journal.add(waiting[finished], finished.result())
                clock.tick(waiting[finished])
        except BrokenProcessPool as error:
            raise CheckpointError("a worker process ended (out of memory?); resume with fewer jobs.") from error
        finally:
            workers.shutdown(cancel_futures=True)
    else:
        with limited(threads):
            for name, record in (spread or in_turn)(plan, slots, todo):
                journal.add(name, record)
                clock.tick(name)
    copy_rest(plan, slots, journal)


def in_turn(plan: Plan, slots: Slots, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One step after the other, here."""
    for name in names:
        yield name, solve_step(plan, name, slots)


def copy_rest(plan: Plan, slots: Slots, journal: Journal) -> None:
    """Write what is not packed."""
    if COPIES not in journal.done:
        write(slots, ((name, stored.chunks()) for name, stored in plan.copies.items()))
        journal.add(COPIES, {})


def solve_step(plan: Plan, name: str, slots: Slots) -> dict[str, Any]:
    """Read, solve and write one step; its record for the journal when the bytes are on disk."""
    began, step = time.perf_counter(), plan.steps[name]
    with torch.no_grad():
        write(slots, ((key, [tensor]) for key, tensor in _tensors(plan, step)))
    rows = [row for matrix in step.matrices for row in _rows(plan, matrix)]
    return {"matrices": rows, "seconds": time.perf_counter() - began}


def solve_tensors(plan: Plan, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and solve one step, and hand over what it gives instead of writing it; see ``solve_step``."""
    began, step = time.perf_counter(), plan.steps[name]
    with torch.no_grad():
        tensors = dict(_tensors(plan, step))
    rows = [row for matrix in step.matrices for row in _rows(plan, matrix)]
    return {"matrices": rows, "seconds": time.perf_counter() - began}, tensors


def _rows(plan: Plan, matrix: Matrix) -> list[dict[str, Any]]:
    """What the report says of a packed tensor: one row, or one per expert, which are solved each by itself."""
    starts = sum(plan.outputs[key].nbytes for key in matrix.outputs if matrix.is_start(key))
    stored = sum(plan.outputs[key].nbytes for key in matrix.outputs) - starts
    shared = {"format": matrix.format, "shape": list(matrix.shape[-2:])}
    count = prod(matrix.shape[:-2])
    names = [matrix.name] if len(matrix.shape) == 2 else [f"{matrix.name}.{i}" for i in range(count)]
    rows = []
    for name in names:
        before, after = plan.quantizer.errors[name]
        sizes = {"bytes": stored // count, "start_bytes": starts // count}
        row = {"name": name, "error_before": before, "error_after": after, **shared, **sizes}
        if name in plan.quantizer.calibrated:
            row["calibrated"] = asdict(plan.quantizer.calibrated[name])
        rows.append(row)
    return rows


def _tensors(plan: Plan, step: Step) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of a step, in the order in which they are solved."""
    solve, model = plan.quantizer.get_quantize_ops(), plan.skeleton.model
    matrices = {matrix.target: matrix for matrix in step.matrices}
    for target, weight in step.reading.read(plan.skeleton.tensors, model):
        if target not in matrices:
            yield target, weight
            continue
        made = solve.convert({target: weight}, model=model)
        if set(made) != set(matrices[target].outputs):
            raise CheckpointError(f"{target} gave {sorted(made)}, planned were {matrices[target].outputs}.")
        yield from made.items()


@contextmanager
def limited(count: int) -> Iterator[None]:
    """Torch's number of threads: results depend on it in the last digit."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


_worker: dict[str, Any] = {}  # of a worker process: its plan and the places of the output


def _start_worker(source: Source, options: QuantizeOptions, slots: Slots, threads: int) -> None:
    """Prepare a worker process, which ends when the process that started it does."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(plan=make_plan(source, options), slots=slots)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(name: str) -> dict[str, Any]:
    return solve_step(_worker["plan"], name, _worker["slots"])


class Clock:
    """Counts matrices for the progress callback; time left is measured by weights, since matrices differ in size."""

    def __init__(self, plan: Plan, journal: Journal, progress: Progress | None) -> None:
        self.plan, self.progress, self.began = plan, progress, time.perf_counter()
        finished = [step for name, step in plan.steps.items() if name in journal.done]
        self.done = sum(len(step.matrices) for step in finished)
        self.weights = self.before = sum(step.weights for step in finished)
        self.total = sum(step.weights for step in plan.steps.values())

    def tick(self, name: str) -> None:
        for matrix in self.plan.steps[name].matrices:
            self.done += 1
            self.weights += matrix.weights
            if self.progress is not None:
                spent = time.perf_counter() - self.began
                left = spent / (self.weights - self.before) * (self.total - self.weights)
                about = f"{matrix.name}, {self.weights / self.total:.0%} of the weights, {_span(left)} left"
                self.progress(self.done, len(self.plan.matrices), about)


def _span(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
