"""The sweep verb: every row of a recipe with every seed; a table, a plot of quality against true bits, one HTML page.

    OUT/cells.jsonl    one line a cell: row, seed, scores, bits, seconds, or why it failed
    OUT/table.md       means over seeds with their standard errors
    OUT/report.html    the same with the plot and the settings, one file that needs no other

A cell that fails is a line with its reason, and the sweep goes on. Finished cells are written down one by one in
OUT.work (``journal``): an interrupted sweep goes on with ``resume`` and the same recipe, failed cells are tried again.
On a Ray cluster the bases, then the rates, then the cells are tasks; journal and report are written here alone.
Where a recipe names several learning ``rates``, each row is trained with each of them from the first seed, judged on
held-out training rows, and keeps the best: the same search for every method.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

import torch

from bitloft import report as paper
from bitloft.checkpoint import write_json
from bitloft.errors import BitloftError, CheckpointError
from bitloft.integrations.ray import Cluster, connected, spread
from bitloft.journal import Journal, working
from bitloft.options.recipe import Recipe, Row, read_recipe
from bitloft.regimes import Bench, main_score, rates_of
from bitloft.sweep_report import Cell, SweepReport, page_of, report_of

CELLS, TABLE, PAGE, RECIPE = "cells.jsonl", "table.md", "report.html", "recipe.json"
Progress = Callable[[int, int, str], None]
Run = Callable[[Sequence["Job"]], Iterator[tuple["Job", Cell]]]
Job = tuple[str, Row, int, float | None]  # base, held or cell; row, seed, learning rate


def sweep(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    work: str | Path | None = None,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Run a recipe (or the TOML file that holds one) into the directory ``out``.

    ``work`` keeps bases for other sweeps; without it they go when the sweep is complete. With a ``cluster`` cells are
    tasks on Ray, with its number of threads; every node must see the model, the data and ``work`` (or ``out``). Raises
    OptionError for a bad recipe or a cluster that cannot be used, DataError for data that is missing, CheckpointError
    where ``out`` or an interrupted run is in the way; what happens inside a cell is a row of the report.
    """
    began = time.perf_counter()
    plan = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    identity = json.loads(json.dumps(asdict(plan), default=dict))
    with (
        nullcontext() if cluster is None else connected(cluster),
        working(out, identity, overwrite=overwrite, resume=resume) as journal,
    ):
        place = Path(work).absolute() if work is not None else journal.directory.parent / "bases"
        bench = Bench.open(plan if cluster is None else _absolute(plan), place)
        resumed = sum("failed" not in cell for cell in journal.done.values())
        if cluster is None:
            _measure(bench, journal, progress)
        else:
            _measure_on(cluster, bench, journal, progress)
        cells = [journal.done[_name(row, seed)] for row, seed in plan.cells()]
        report = report_of(str(out), plan, cells, resumed, time.perf_counter() - began)
        write_json(journal.directory / RECIPE, identity)
        lines = "".join(json.dumps(cell, sort_keys=True) + "\n" for cell in cells)
        (journal.directory / CELLS).write_text(lines, encoding="utf-8")
        (journal.directory / TABLE).write_text(report.table().markdown() + "\n", encoding="utf-8")
        paper.write(journal.directory / PAGE, page_of(report, plan))
    return report


def _measure(bench: Bench, journal: Journal, progress: Progress | None) -> None:
    """Every cell that is not in the journal, in the recipe's order."""
    planned = list(bench.recipe.cells())
    for done, (row, seed) in enumerate(planned):
        if progress is not None:
            progress(done, len(planned), f"{row.label}, seed {seed}")
        name = _name(row, seed)
        if name in journal.done and "failed" not in journal.done[name]:
            continue
        journal.add(name, _headed(row, seed) | _cell(bench, journal, row, seed))
    if progress is not None:
        progress(len(planned), len(planned), "")


def _cell(bench: Bench, journal: Journal, row: Row, seed: int) -> Cell:
    return _tried(lambda: bench.run(row, seed, rate=_rate(bench, journal, row)))


def _tried(run: Callable[[], Cell]) -> Cell:
    """What ``run`` gives, or why it failed."""
    try:
        return run()
    except BitloftError as error:
        return {"failed": str(error)}
    except Exception as error:  # a cell that runs out of memory or meets a bug must not take the others with it
        return {"failed": f"{type(error).__name__}: {error}"}


def _rate(bench: Bench, journal: Journal, row: Row) -> float | None:
    """The learning rate of a row that held-out rows choose; None where there is no search."""
    for rate in rates_of(bench.recipe, row):
        if _rate_name(row, rate) not in journal.done:
            journal.add(_rate_name(row, rate), bench.run(row, bench.recipe.seeds[0], rate=rate, held=True))
    return _best(bench, journal, row)


def _best(bench: Bench, journal: Journal, row: Row) -> float | None:
    found: dict[float, float] = {}
    for rate in rates_of(bench.recipe, row):
        score = main_score(journal.done[_rate_name(row, rate)]["scores"], bench.recipe.metric)
        found[rate] = score["value"] if score["better"] == "high" else -score["value"]
    return max(found, key=lambda rate: found[rate]) if found else None


def _rate_name(row: Row, rate: float | None) -> str:
    return f"rate {rate:g} of {row.label}"


def _measure_on(cluster: Cluster, bench: Bench, journal: Journal, progress: Progress | None) -> None:
    """Every cell that is not in the journal, as tasks: first the bases, each once, then the rates, then the cells.

    A base that cannot be made, or a rate that cannot be tried, fails the cells of its rows, as it does without Ray.
    """
    planned = list(bench.recipe.cells())
    todo = [(row, seed) for row, seed in planned if "failed" in journal.done.get(_name(row, seed), {"failed": ""})]
    done = len(planned) - len(todo)
    with _signed(bench.work) as sign:
        setup, key = (bench.recipe, bench.work, sign, cluster.threads), uuid4().hex

        def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, Cell]]:
            return spread(cluster, _prepare, setup, _work, jobs, key=key, lost=_lost)

        rows = {row.label: row for row, _ in todo}
        failed = _make_bases(bench, rows, run)
        failed |= _try_rates(bench, journal, {name: row for name, row in rows.items() if name not in failed}, run)
        given = (
            (("cell", row, seed, None), {"failed": failed[row.label]}) for row, seed in todo if row.label in failed
        )
        good = [pair for pair in todo if pair[0].label not in failed]
        made = run([("cell", row, seed, _best(bench, journal, row)) for row, seed in good])
        for (_, row, seed, _), cell in itertools.chain(given, made):
            journal.add(_name(row, seed), _headed(row, seed) | cell)
            done += 1
            if progress is not None:
                progress(done, len(planned), f"{row.label}, seed {seed}")


def _make_bases(bench: Bench, rows: dict[str, Row], run: Run) -> dict[str, str]:
    """Pack what rows share, each base by one task. Why it could not be, by the labels of its rows."""
    failed, places = dict[str, str](), dict[Path, list[Row]]()
    for label, row in rows.items():
        found = _tried(lambda row=row: {"place": bench.place(row)})  # type: ignore[misc]
        if "failed" in found:
            failed[label] = found["failed"]
        elif row.format is not None:
            places.setdefault(found["place"], []).append(row)
    jobs: list[Job] = [("base", same[0], 0, None) for place, same in places.items() if not place.exists()]
    for (_, row, _, _), cell in run(jobs):
        if "failed" in cell:
            same = next(same for same in places.values() if same[0].label == row.label)
            failed |= {other.label: cell["failed"] for other in same}
    return failed


def _try_rates(bench: Bench, journal: Journal, rows: dict[str, Row], run: Run) -> dict[str, str]:
    """Fill the journal with what the learning rates come to; of a row's failures the first, by its label."""
    first = bench.recipe.seeds[0]
    wanted: list[Job] = [("held", row, first, rate) for row in rows.values() for rate in rates_of(bench.recipe, row)]
    lost: dict[tuple[str, float | None], str] = {}
    for (_, row, _, rate), cell in run([job for job in wanted if _rate_name(job[1], job[3]) not in journal.done]):
        if "failed" in cell:
            lost[row.label, rate] = cell["failed"]
        else:
            journal.add(_rate_name(row, rate), cell)
    named = [(row.label, rate) for _, row, _, rate in wanted]
    return {name[0]: lost[name] for name in reversed(named) if name in lost}


@contextmanager
def _signed(work: Path) -> Iterator[Path]:
    """A file in ``work``, by which a node shows that it sees the same directory."""
    work.mkdir(parents=True, exist_ok=True)
    (sign := work / f"cluster-{uuid4().hex}.txt").touch()
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


def _prepare(recipe: Recipe, work: Path, sign: Path, threads: int) -> Bench:
    """In a worker: the recipe, opened. Raises CheckpointError on a node that sees another ``work``."""
    if not sign.is_file():
        raise CheckpointError(f"this node does not see {work} as the others do; put it on shared storage.")
    torch.set_num_threads(threads)
    return Bench.open(recipe, work)


def _work(bench: Bench, job: Job) -> Cell:
    """In a worker: a base, or a row's training and judging."""
    kind, row, seed, rate = job
    if kind == "base":
        return _tried(lambda: {"base": str(bench.base(row))})
    return _tried(lambda: bench.run(row, seed, rate=rate, held=kind == "held"))


def _lost(job: Job, reason: str) -> Cell:
    """The row of a task whose process died every time."""
    return {"failed": reason}


def _absolute(plan: Recipe) -> Recipe:
    """The recipe as a process in another directory reads it."""

    def full(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path and Path(path).exists() else path

    model = full(plan.model) or plan.model
    return replace(plan, model=model, data=full(plan.data), calibrate=full(plan.calibrate))


def _headed(row: Row, seed: int) -> Cell:
    return {"row": row.label, "regime": row.regime, "seed": seed}


def _name(row: Row, seed: int) -> str:
    return f"{row.label}, seed {seed}"
