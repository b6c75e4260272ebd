"""What each command does on a terminal: call the verb with a progress bar, print what came of it.

Verbs are imported inside the functions, so that ``bitloft --help`` loads neither torch nor transformers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bitloft.errors import OptionError
from bitloft.options import (
    CompressOptions,
    EvalOptions,
    GenerateOptions,
    QuantizeOptions,
    ServeOptions,
    TrainOptions,
)
from bitloft.report import size
from bitloft.terminal import emit, progress, show, table

Base = Annotated[Path, typer.Argument(metavar="DIR", help="a base made by `bitloft quantize`")]
Out = Annotated[Path, typer.Option("--out", help="directory to make; written beside and renamed")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace --out where it exists")]
Data = Annotated[Path, typer.Option("--data", help="FILE.jsonl (text, prompt/completion or messages rows) or FILE.txt")]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="hub name, safetensors folder or .gguf file")],
    out: Out,
    options: QuantizeOptions,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an interrupted run of the same settings")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", help="processes, each on matrices of its own")] = 1,
    threads: Annotated[int, typer.Option("--threads", help="threads of each process; part of what a run is")] = 1,
    shard_size: Annotated[str, typer.Option("--shard-size", help="largest weight file, such as 5GB")] = "50GB",
) -> None:
    """Quantize a model to 2-4 bits and find the LoRA start that repairs it, in the memory of its largest matrix."""
    from bitloft.quantize import quantize as verb

    run: dict[str, Any] = {"resume": resume, "jobs": jobs, "threads": threads, "shard_size": shard_size}
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
    found = f"target {widths.target_bits}: squared error {widths.error:.4g}, {widths.uniform} for all has "
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


def train(base: Base, data: Data, out: Out, options: TrainOptions, overwrite: Overwrite = False) -> None:
    """Fine-tune a LoRA adapter on a packed base."""
    from bitloft.train import train as verb

    with progress("training") as step:
        report = verb(base, data, out, options, overwrite=overwrite, progress=step)
    show(
        f"adapter {out}",
        {
            "loss": f"{report.first_loss:.4f} -> {report.last_loss:.4f} in {report.steps} steps",
            "adapter": f"rank {report.rank}, {report.parameters:,} values, start {report.start}",
            "data": _data(report.data),
            "computed in": f"{report.dtype} ({report.dtype_why})",
            "resumed from": "the beginning" if report.resumed_from is None else f"step {report.resumed_from}",
            "time": f"{report.seconds:.1f} s, {report.seconds_per_step:.2f} s a step",
        },
    )


def _data(report: Any) -> str:
    """Counts of a DataReport, and what the user must be told about the rows."""
    counts = f"{report.rows:,} rows, {report.examples:,} sequences, {report.target_tokens:,} target tokens"
    return " ".join([counts + ".", *report.sentences()])


def compress(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="a PEFT LoRA directory, or a directory of them")],
    out: Out,
    options: CompressOptions,
    base: Annotated[Path | None, typer.Option("--base", help="refuse an adapter that is not of this base")] = None,
    overwrite: Overwrite = False,
    jobs: Annotated[int, typer.Option("--jobs", help="processes, for a directory of adapters")] = 1,
    moments: Annotated[
        Path | None,
        typer.Option("--moments", help="statistics of `quantize`: errors count where the base's inputs are"),
    ] = None,
) -> None:
    """Quantize a trained adapter, or each in a directory, into packed ones of 0.2 to 4 true bits."""
    from bitloft.bulk import holds_adapters
    from bitloft.compress import compress as verb

    if holds_adapters(adapter):
        if moments is not None:
            raise OptionError("--moments is for one adapter; a directory's are packed in the plain norm.")
        _compress_all(adapter, out, options, base, overwrite, jobs)
        return
    from bitloft.calibrate.statistics import read_moments

    if jobs != 1:
        raise OptionError(f"--jobs {jobs} needs a directory of adapters; {adapter} is one adapter.")
    with progress("packing") as step:
        given = None if moments is None else read_moments(moments)
        report = verb(adapter, out, options, base=base, moments=given, overwrite=overwrite, progress=step)
    show(
        f"packed adapter {out}",
        {
            "method": ", ".join(f"{key}={value}" for key, value in report.method.items()),
            "true bits": f"{report.true_bits:.3f} per trained value, all files counted",
            "payload bits": f"{report.payload_bits:.3f} per trained value, codes alone",
            "error": f"{report.error:.4f} (squared error of the product, relative)",
            "stored": f"{size(report.bytes)}, was {size(report.source_bytes)}",
            "notes": "; ".join(report.notes) or "none",
            "ignored": ", ".join(report.ignored) or "nothing",
            "time": f"{report.seconds:.1f} s",
        },
    )


def _compress_all(
    adapters: Path, out: Path, options: CompressOptions, base: Path | None, overwrite: bool, jobs: int
) -> None:
    from bitloft.bulk import compress_all

    if overwrite:
        raise OptionError("--overwrite is for one adapter; a directory's packed ones are kept or removed by hand.")
    with progress("packing") as step:
        report = compress_all(adapters, out, options, base=base, jobs=jobs, progress=step)
    counts = ", ".join(f"{report.count(state)} {state}" for state in ("packed", "kept", "failed"))
    show(f"packed adapters {out}", {"adapters": counts, "report": str(out / "reports" / "index.html")})
    emit(
        table(
            ("adapter", "state", "true bits", "error", "stored", "note"),
            [(r.name, r.state, r.true_bits or "", r.error or "", size(r.bytes or 0), r.reason) for r in report.rows],
        )
    )
    if report.count("failed"):
        raise typer.Exit(1)


def expand(
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="a packed adapter")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Turn a packed adapter back into a plain PEFT directory."""
    from bitloft.compress import expand as verb

    verb(packed, out, overwrite=overwrite)
    show(f"plain adapter {out}", {"from": str(packed)})


def evaluate(
    base: Base,
    data: Data,
    options: EvalOptions,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="plain or packed adapter to put on the base")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure held-out loss and perplexity, with their standard errors."""
    from bitloft.evaluate import evaluate as verb

    with progress("evaluating") as step:
        report = verb(base, data, adapter, options, progress=step)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    show(
        f"{base} on {data.name}" + (f" with {adapter}" if adapter else ""),
        {
            "perplexity": f"{report.perplexity:.4f} +- {_error(report.perplexity_stderr)}",
            "loss": f"{report.loss:.5f} +- {_error(report.stderr)} nats per token",
            "measured on": f"{report.tokens:,} tokens in {report.sequences} sequences, {report.clusters} clusters",
            "data": _data(report.data),
            "computed in": report.dtype,
            "time": f"{report.seconds:.1f} s",
        },
    )


def _error(value: float | None) -> str:
    return "unknown (one document)" if value is None else f"{value:.4g}"


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


def serve(
    base: Base,
    options: ServeOptions,
    adapter_dir: Annotated[
        Path | None, typer.Option("--adapter-dir", help="directory whose subdirectories are adapters")
    ] = None,
) -> None:
    """Serve a base and its adapters over an OpenAI-shaped HTTP interface."""
    from bitloft.serve.http import serve as verb

    verb(base, adapter_dir, options)


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


def info() -> None:
    """Show versions, the machine, and which kernels run and why."""
    from bitloft.inspection import machine

    show("bitloft", machine())


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "train": train,
    "compress": compress,
    "expand": expand,
    "eval": evaluate,
    "generate": generate,
    "serve": serve,
    "inspect": inspect,
    "info": info,
}
