"""What `bitloft train`, `bitloft eval` and `bitloft sweep` print; see console.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bitloft.console import Address, Base, Engine, Out, Overwrite, TaskMemory, cluster_of, data_counts
from bitloft.errors import OptionError
from bitloft.options import EvalOptions, TrainOptions, require
from bitloft.terminal import emit, progress, show, table

Task = Annotated[
    str | None, typer.Option("--task", help="a task by name, such as sst2, squad, xsum, gsm8k or wikitext2")
]
MaybeData = Annotated[
    Path | None,
    typer.Option("--data", help="FILE.jsonl or FILE.txt; with --task its folder (left out: the hub's data set)"),
]


def train(
    base: Base,
    out: Out,
    options: TrainOptions,
    data: MaybeData = None,
    task: Task = None,
    limit: Annotated[int | None, typer.Option("--limit", help="with --task: train on the first so many rows")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a LoRA adapter on a packed base; on a data file also by several processes (torchrun, accelerate)."""
    if task is not None:
        _train_task(base, task, data, out, options, limit, overwrite)
        return
    require(data is not None, "train learns from --data FILE or from --task NAME; give one of them.")
    require(limit is None, "limit is for --task; cut the data file itself.")
    from bitloft.integrations.distributed import is_first
    from bitloft.train import train as verb

    if not is_first():
        verb(base, str(data), out, options, overwrite=overwrite)
        return
    with progress("training") as step:
        report = verb(base, str(data), out, options, overwrite=overwrite, progress=step)
    show(
        f"adapter {out}",
        {
            "loss": f"{report.first_loss:.4f} -> {report.last_loss:.4f} in {report.steps} steps",
            "adapter": f"rank {report.rank}, {report.parameters:,} values, start {report.start}",
            "data": data_counts(report.data),
            "computed in": f"{report.dtype} ({report.dtype_why})",
            "resumed from": "the beginning" if report.resumed_from is None else f"step {report.resumed_from}",
            "time": f"{report.seconds:.1f} s, {report.seconds_per_step:.2f} s a step",
        },
    )


def evaluate(
    base: Base,
    options: EvalOptions,
    data: MaybeData = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="plain or packed adapter to put on the base")
    ] = None,
    task: Task = None,
    harness: Annotated[
        str | None, typer.Option("--harness", help="tasks of lm-eval by name, separated by commas (bitloft[eval])")
    ] = None,
    harness_tasks: Annotated[
        Path | None, typer.Option("--harness-tasks", help="with --harness: folder with lm-eval task files of your own")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", help="with --harness: examples in a prompt (default: the task's)"),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="with --task: answers to a row, for pass@k")] = None,
    beams: Annotated[int, typer.Option("--beams", help="with --task: beams of an encoder-decoder's search")] = 1,
    generates: Annotated[
        bool, typer.Option("--generates/--no-generates", help="with --task: write answers, or take the loss alone")
    ] = True,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="run programs that the model wrote (humaneval, mbpp)")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure held-out loss and perplexity, a task's metrics or lm-eval's, with their standard errors."""
    for flag, given in (("harness-tasks", harness_tasks), ("shots", shots)):
        require(harness is not None or given is None, f"--{flag} is for --harness; leave it out.")
    if task is not None or harness is not None:
        require(task is None or harness is None, "task and harness are two things to measure; give one of them.")
        if harness is not None:
            require(data is None, "data is for --task or stands alone; lm-eval's tasks bring their own.")
            _run_harness(base, harness, adapter, options, {"include": harness_tasks, "shots": shots}, as_json)
            return
        how = {"samples": samples, "beams": beams, "generates": generates, "allow_code_execution": allow_code_execution}
        _judge_task(base, str(task), data, adapter, options, how, as_json)
        return
    if data is None:
        raise OptionError("eval measures on --data FILE, on --task NAME or by --harness TASKS; give one of them.")
    from bitloft.evaluate import evaluate as verb

    with progress("evaluating") as step:
        report = verb(base, data, adapter, options, progress=step)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    _show_losses(f"{base} on {data.name}" + (f" with {adapter}" if adapter else ""), report)


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, such as recipes/small/minilm-sst2.toml")],
    out: Out,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an interrupted sweep of the same recipe")
    ] = False,
    work: Annotated[Path | None, typer.Option("--work", help="keep packed bases here, for other sweeps")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    engine: Engine = "local",
    address: Address = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="ray: cells at a time (default: all there is room for)")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="ray: threads of a cell (default: 1)")] = None,
    task_memory: TaskMemory = None,
) -> None:
    """Run a recipe: every regime, width, rank and seed of it, with a table, a plot and one HTML page."""
    from bitloft.sweep import sweep as verb

    cluster = cluster_of(engine, address, task_memory, jobs, 1 if threads is None else threads)
    for flag, given in (("jobs", jobs), ("threads", threads)):
        if cluster is None and given is not None:
            raise OptionError(f"--{flag} is for --engine ray; leave it out.")
    with progress("sweeping") as step:
        report = verb(recipe, out, resume=resume, overwrite=overwrite, work=work, cluster=cluster, progress=step)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        found = report.table()
        emit(table(found.columns, found.rows))
        counts = f"{report.cells}, of them {report.failures} failed and {report.resumed} from before"
        show(str(out), {"cells": counts, "report": str(out / "report.html"), "time": f"{report.seconds:.1f} s"})
    if report.failures:
        raise typer.Exit(1)


def _train_task(
    base: Path, task: str, data: Path | None, out: Path, options: TrainOptions, limit: int | None, overwrite: bool
) -> None:
    """`train --task`."""
    from bitloft.tune import tune

    with progress("training") as step:
        report = tune(base, task, out, data, options, limit=limit, overwrite=overwrite, progress=step)
    show(
        f"adapter {out}",
        {
            "task": task,
            "loss": f"{report.first_loss:.4f} -> {report.last_loss:.4f} in {report.steps} steps",
            "adapter": f"rank {report.rank}, {report.parameters:,} values, start {report.start}",
            "head": f"{getattr(report, 'head_parameters', 0):,} values",
            "time": f"{report.seconds:.1f} s",
        },
    )


def _show_losses(title: str, report: Any) -> None:
    """`eval --data`."""
    show(
        title,
        {
            "perplexity": f"{report.perplexity:.4f} +- {_error(report.perplexity_stderr)}",
            "loss": f"{report.loss:.5f} +- {_error(report.stderr)} nats per token",
            "measured on": f"{report.tokens:,} tokens in {report.sequences} sequences, {report.clusters} clusters",
            "data": data_counts(report.data),
            "computed in": report.dtype,
            "time": f"{report.seconds:.1f} s",
        }
        | ({} if report.mismatch is None else {"adapter was": report.mismatch}),
    )


def _judge_task(
    base: Path,
    task: str,
    data: Path | None,
    adapter: Path | None,
    options: EvalOptions,
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """`eval --task`."""
    from bitloft.judge import judge

    report = judge(base, task, data, adapter, options, **how)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    facts = {score.name: f"{score.value:.4f} +- {_error(score.stderr)}" for score in report.scores}
    facts |= {"rows": f"{report.rows:,}", "computed in": report.dtype, "time": f"{report.seconds:.1f} s"}
    facts |= {} if report.sandbox is None else {"programs ran": report.sandbox}
    show(f"{base} on {task}" + (f" with {adapter}" if adapter else ""), facts)


def _run_harness(
    base: Path, names: str, adapter: Path | None, options: EvalOptions, how: dict[str, Any], as_json: bool
) -> None:
    """`eval --harness`: lm-eval's tasks by their names, separated by commas."""
    require(
        options.length == EvalOptions().length,
        "length is not for --harness: lm-eval fills the model's context.",
    )
    import torch

    from bitloft.integrations.lm_eval import harness
    from bitloft.integrations.opening import open_model
    from bitloft.tasks.precision import choose_precision
    from bitloft.tune import with_adapter

    model, tokenizer, _ = open_model(base, options.activations)
    held: Any = model
    if adapter is not None:
        held, note = with_adapter(model, adapter, base, options.base_mismatch)
        if note is not None:
            typer.echo(f"adapter {adapter} was {note}", err=True)
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    dtype = choose_precision(options.dtype, torch.device("cpu")).dtype
    found = harness(held, tokenizer, tasks, limit=options.limit, batch=options.batch, dtype=dtype, **how)
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [(task, name, value) for task, figures in found.items() for name, value in figures.items()]
    emit(table(("task", "metric", "value"), rows))


def _error(value: float | None) -> str:
    return "unknown (one row or document)" if value is None else f"{value:.4g}"


COMMANDS: dict[str, Callable[..., None]] = {"train": train, "eval": evaluate, "sweep": sweep}
