"""Quantizing on Ray: each step of a plan is a task, and what it packs is written to its place by the one who asked.

    source (a path that every node sees, a URL, a hub name)  ->  task: read, solve, pack  ->  object store  ->  slots

Packed tensors are an eighth of the weights at 2 bits, so one writer keeps up with many solvers, the output needs no
shared file system, and files and journal are written exactly as by a run on one machine: the bytes are the same, and a
run begun one way can be resumed the other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from bitloft.errors import CheckpointError
from bitloft.integrations.ray import Cluster, connected, spread
from bitloft.integrations.source import open_source
from bitloft.options import QuantizeOptions
from bitloft.slots import Slots, write
from bitloft.solvers import Statistics
from bitloft.stream import Plan, Spread, make_plan, solve_tensors

Item = tuple[str, dict[str, Statistics] | None]
Made = tuple[dict[str, Any], dict[str, NDArray[np.uint8]]]


@contextmanager
def fanned(model: str, options: QuantizeOptions, cluster: Cluster | None) -> Iterator[Spread | None]:
    """What solves the steps of a plan of ``model`` on the cluster, connected while the context lasts; None without one.

    Raises OptionError where the cluster cannot be used.
    """
    if cluster is None:
        yield None
        return
    chosen, key = cluster, uuid4().hex

    def solve(plan: Plan, slots: Slots, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        items: list[Item] = [(name, _statistics(plan, name)) for name in names]
        setup = (model, options, chosen.threads, _digest(plan), torch.backends.cpu.get_cpu_capability())
        for (name, _), (record, tensors) in spread(chosen, _prepare, setup, _work, items, key=key):
            write(slots, ((key, [torch.from_numpy(data.copy())]) for key, data in tensors.items()))
            yield name, record

    with connected(chosen):
        yield solve


def _statistics(plan: Plan, name: str) -> dict[str, Statistics] | None:
    """What is known of the inputs of a step's matrices, where the solver asks for it."""
    if not plan.measured:
        return None
    matrices = [matrix.name for matrix in plan.steps[name].matrices]
    known = {matrix: plan.quantizer.statistics.get(matrix) for matrix in matrices}
    return {matrix: found for matrix, found in known.items() if found is not None}


def _digest(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    """What a node must see of the same model: the steps and the shapes of what they read."""
    return [(name, matrix.shape) for name, step in plan.steps.items() for matrix in step.matrices]


def _prepare(model: str, options: QuantizeOptions, threads: int, digest: object, capability: str) -> Plan:
    """In a worker: the same plan. Raises CheckpointError for another model, or a processor that computes otherwise."""
    found = torch.backends.cpu.get_cpu_capability()
    if found != capability:
        raise CheckpointError(
            f"the job was begun on a processor with {capability} and this one has {found}, so results would differ in "
            "their last digits; use nodes of one kind (or set ATEN_CPU_CAPABILITY on all)."
        )
    torch.set_num_threads(threads)
    plan = make_plan(open_source(model), options)
    if _digest(plan) != digest:
        raise CheckpointError(f"{model} holds another model here than where the job was begun; use shared storage.")
    return plan


def _work(plan: Plan, item: Item) -> Made:
    """In a worker: one step's record and the bytes of its tensors."""
    name, statistics = item
    plan.quantizer.statistics = statistics or {}
    record, tensors = solve_tensors(plan, name)
    flat = {key: tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for key, tensor in tensors.items()}
    return record, flat
