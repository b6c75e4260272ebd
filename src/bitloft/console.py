"""What each command does on a terminal: call the verb with a progress bar, print what came of it.

Verbs are imported inside the functions, so that ``bitloft --help`` loads neither torch nor transformers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bitloft.errors import OptionError
from bitloft.options import GenerateOptions, QuantizeOptions
from bitloft.report import size
from bitloft.terminal import emit, progress, show, table

Base = Annotated[Path, typer.Argument(metavar="DIR", help="a base made by `bitloft quantize`")]
Out = Annotated[Path, typer.Option("--out", help="directory to make; written beside and renamed")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace --out where it exists")]
Data = Annotated[Path, typer.Option("--data", help="FILE.jsonl (text, prompt/completion or messages rows) or FILE.txt")]

Engine = Annotated[str, typer.Option("--engine", help="local, or ray: work as tasks on a Ray cluster")]
Address = Annotated[
    str | None, typer.Option("--address", help="ray: auto or HOST:PORT of a cluster (default: one on this machine)")
]
TaskMemory = Annotated[str | None, typer.Option("--task-memory", help="ray: memory that a task is promised, as 4GB")]


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="hub name, safetensors folder or its URL, or .gguf file")
    ],
    out: Annotated[
        str, typer.Option("--out", help="directory to make, written beside and renamed; or its URL in object storage")
    ],
    options: QuantizeOptions,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an interrupted run of the same settings")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="processes, each on matrices of its own (default: 1; ray: all there are)"),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="threads of each process; part of what a run is")] = 1,
    shard_size: Annotated[str, typer.Option("--shard-size", help="largest weight file, such as 5GB")] = "50GB",
    engine: Engine = "local",
    address: Address = None,
    task_memory: TaskMemory = None,
    stage: Annotated[
        Path | None,
        typer.Option("--stage", help="where a base for a URL is made before it is sent (default: here)"),
    ] = None,
) -> None:
    """Quantize a model to 2-4 bits and find the LoRA start that repairs it, in the memory of its largest matrix."""
    from bitloft.quantize import quantize as verb

    cluster = cluster_of(engine, address, task_memory, jobs, threads)
    run: dict[str, Any] = {"resume": resume, "threads": threads, "shard_size": shard_size, "cluster": cluster}
    run["stage"] = stage
    run["jobs"] = 1 if cluster is not None or jobs is None else jobs
    with progress("quantizing") as step:
        report = verb(model, out, options, overwrite=overwrite, progress=step, **run)
    before = sum(m.error_before for m in report.matrices) / len(report.matrices)
    after = sum(m.error_after for m in report.matrices) / len(report.matrices)
    show(
        f"{report.source} -> {report.out}",
        {
            "packed": f"{len(report.matrices)} matrices, {report.weights:,} weights in {report.formats}",
            "payload bits": f"{report.payload_bits:.3f} per weight, codes alone",
            "true bits": f"{report.true_bits:.3f} per weight, {report.true_bits_with_start:.3f} with the start",
            "widths": _widths(report.widths),
            "mean error": f"{before:.4f} rounded, {after:.4f} with the start (relative Frobenius norm)",
            "refined": _refined(report.refined),
            "calibrated": _calibration(report.calibration),
            "stored": f"{size(report.stored_bytes)}, of it embeddings {size(report.embedding_bytes)}",
            "was": size(report.source_bytes),
            "chosen": report.selection,
            "left alone": _reasons(report.left),
            "ignored": ", ".join(report.ignored) or "nothing",
            "time": f"{report.seconds:.1f} s" + (f", {report.resumed} matrices before" if report.resumed else ""),
        },
    )


def cluster_of(engine: str, address: str | None, memory: str | None, jobs: int | None, threads: int = 1) -> Any:
    """The Cluster that flags ask for, None for the local engine. Raises OptionError for flags that contradict."""
    if engine not in ("local", "ray"):
        raise OptionError(f"unknown engine {engine!r}; use local or ray.")
    if engine == "local":
        for name, value in (("address", address), ("task-memory", memory)):
            if value is not None:
                raise OptionError(f"--{name} is for --engine ray; leave it out.")
        return None
    from bitloft.integrations.ray import Cluster
    from bitloft.slots import bytes_of

    promised = None if memory is None else bytes_of(memory, "task_memory")
    return Cluster(address=address, workers=jobs, threads=threads, memory=promised)


def _calibration(found: Any) -> str:
    """What was measured, for people; ``found`` is a Calibration or None."""
    if found is None:
        return "no"
    how = f"{found.sequences:,} sequences of {found.text}, {found.tokens:,} tokens, {found.way}"
    return how + (f"; {found.reused} blocks from saved statistics" if found.reused else "")


def _widths(widths: Any) -> str:
    """What target_bits came to, for people; ``widths`` is a Widths or None."""
    if widths is None:
        return "as asked"
    what = {"weights": "squared error", "outputs": "error of outputs", "loss": "loss added"}[widths.counted]
    found = f"target {widths.target_bits}: {what} {widths.error:.4g}, {widths.uniform} for all has "
    found += f"{widths.uniform_error:.4g} in {widths.uniform_bits:.3f} bits"
    if widths.perplexity is None:
        return f"{found}; not checked on text (give --check-text)"
    return f"{found}; perplexity {widths.perplexity:.4f} against {widths.uniform_perplexity:.4f}, {widths.kept} kept"


def _refined(found: Any) -> str:
    """What refining came to, for people; ``found`` is a RefineReport or None."""
    if found is None:
        return "no"
    before, after = (
        loss.hidden if loss.next_token is None else loss.next_token for loss in (found.before, found.after)
    )
    kind = "error of the last hidden states" if found.before.next_token is None else "nats per token"
    kept = "" if found.kept else "; it did not lower the loss and was dropped"
    return f"{before:.4f} -> {after:.4f} {kind}, held out, in {found.steps} steps{kept}"


def _reasons(left: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in left.values():
        counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "nothing"


def data_counts(report: Any) -> str:
    """Counts of a DataReport, and what the user must be told about the rows."""
    counts = f"{report.rows:,} rows, {report.examples:,} sequences, {report.target_tokens:,} target tokens"
    return " ".join([counts + ".", *report.sentences()])


def generate(
    base: Base,
    prompt: Annotated[list[str], typer.Option("--prompt", help="a prompt; repeat for more")],
    options: GenerateOptions,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="[NAME=]PATH; repeat: every prompt is answered by each")
    ] = None,
) -> None:
    """Answer prompts by the base, or by several adapters in one batch."""
    from bitloft.generate import generate as verb

    adapters = named_paths(adapter or [])
    names: Sequence[str | None] = list(adapters) or [None]
    rows = [(text, name) for text in prompt for name in names]
    answers = verb(base, [text for text, _ in rows], adapters, [name for _, name in rows], options)
    for (text, name), answer in zip(rows, answers, strict=True):
        typer.echo(f"[{name or 'base'}] {text}\n{answer}\n")


def named_paths(given: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH or PATH (named by its last part) -> path. Raises OptionError for a name given twice."""
    found: dict[str, Path] = {}
    for item in given:
        name, sep, path = item.partition("=")
        if not sep:
            name, path = Path(item).name, item
        if name in found:
            raise OptionError(f"two adapters are named {name!r}; tell them apart by NAME=PATH.")
        found[name] = Path(path)
    return found


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a base, a plain adapter or a packed one")],
    other: Annotated[Path | None, typer.Option("--compare", help="another base to put beside it")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="write table and plot to this file instead")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what is inside: per module format, true bits, payload bits and error; or two bases side by side."""
    from bitloft import inspection
    from bitloft.report import write

    found = inspection.inspect(path) if other is None else inspection.compare(path, other)
    if page is not None:
        write(page, inspection.page_of(found, str(path)))
        show(str(page), {"table and plot of": f"{found.kind} {path}"})
        return
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    show(f"{found.kind} {path}", found.summary)
    emit(table(found.columns, found.rows))


def info(
    bench: Annotated[bool, typer.Option("--bench", help="measure the machine and each operator, in seconds")] = False,
) -> None:
    """Show versions, the machine, and which kernels run and why."""
    from bitloft.inspection import machine

    show("bitloft", machine())
    if bench:
        _standings()


def _standings() -> None:
    from bitloft import roofline

    roof = roofline.roof()
    rates = {
        f"{str(dtype).removeprefix('torch.')} product": f"{rate / 1e9:.0f} GFLOP/s"
        for dtype, rate in roof.rates.items()
    }
    show("this machine", {"read bandwidth": f"{roof.bandwidth / 1e9:.1f} GB/s", **rates})
    columns = ("operator, 4096 x 4096", "ms", "floor ms", "of floor", "bound by")
    rows = [
        (s.name, f"{1e3 * s.seconds:.3f}", f"{1e3 * s.floor:.3f}", f"{s.floor / s.seconds:.0%}", s.bound)
        for s in roofline.standings(roof)
    ]
    emit(table(columns, rows))


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "generate": generate,
    "inspect": inspect,
    "info": info,
}
