"""What `bitloft compress`, `bitloft rebase` and `bitloft expand` print; see console.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bitloft.console import Address, Data, Engine, Out, Overwrite, TaskMemory, cluster_of, data_counts
from bitloft.errors import OptionError
from bitloft.options import CompressOptions, RebaseOptions
from bitloft.report import size
from bitloft.terminal import emit, progress, show, table

TrainedOn = Annotated[
    str | None, typer.Option("--from", help="the base or model that the adapter was trained on, if it is at hand")
]

Jobs = Annotated[
    int | None, typer.Option("--jobs", help="processes, for a directory of adapters (default: 1; ray: all there are)")
]
Moments = Annotated[
    Path | None, typer.Option("--moments", help="statistics of `quantize`: errors count where the base's inputs are")
]


def compress(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="a PEFT LoRA directory, or a directory of them")],
    out: Out,
    options: CompressOptions,
    base: Annotated[Path | None, typer.Option("--base", help="the base that it is for")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="FILE.jsonl or FILE.txt to measure a mismatch on, and to distill on")
    ] = None,
    trained_on: TrainedOn = None,
    overwrite: Overwrite = False,
    jobs: Jobs = None,
    moments: Moments = None,
    engine: Engine = "local",
    address: Address = None,
    task_memory: TaskMemory = None,
) -> None:
    """Quantize a trained adapter, or each in a directory, into packed ones of 0.2 to 4 true bits."""
    from bitloft.bulk import holds_adapters
    from bitloft.compress import compress as verb

    if holds_adapters(adapter):
        if overwrite:
            raise OptionError("--overwrite is for one adapter; a directory's packed ones are kept or removed by hand.")
        if trained_on is not None:
            raise OptionError("--from is for one adapter; pack those of another base one by one.")
        if moments is not None:
            raise OptionError("--moments is for one adapter; a directory's are packed in the plain norm.")
        cluster = cluster_of(engine, address, task_memory, jobs)
        _compress_all(adapter, out, options, base, data, 1 if cluster is not None or jobs is None else jobs, cluster)
        return
    from bitloft.calibrate.statistics import read_moments

    for flag, given in ((f"--engine {engine}", engine != "local"), (f"--jobs {jobs}", jobs not in (None, 1))):
        if given:
            raise OptionError(f"{flag} needs a directory of adapters; {adapter} is one adapter.")
    with progress("packing") as step:
        report = verb(
            adapter,
            out,
            options,
            base=base,
            data=data,
            trained_on=trained_on,
            moments=None if moments is None else read_moments(moments),
            overwrite=overwrite,
            progress=step,
        )
    facts = {
        "method": ", ".join(f"{key}={value}" for key, value in report.method.items()),
        "true bits": f"{report.true_bits:.3f} per trained value, all files counted",
        "payload bits": f"{report.payload_bits:.3f} per trained value, codes alone",
        "error": f"{report.error:.4f} (squared error of the product, relative)",
        "distilled": _distilled(report.distilled),
        "it was": report.mismatch,
        "stored": f"{size(report.bytes)}, was {size(report.source_bytes)}",
        "notes": "; ".join(report.notes) or "none",
        "ignored": ", ".join(report.ignored) or "nothing",
        "time": f"{report.seconds:.1f} s",
    }
    show(f"packed adapter {out}", {key: value for key, value in facts.items() if value is not None})


def _distilled(report: Any) -> str | None:
    """What a distillation came to, for people; ``report`` is a Distilled or None."""
    if report is None:
        return None
    what = "scales and codes" if report.codes else "scales"
    found = f"{report.steps} steps on {what}: held-out loss {report.loss_before:.5f} -> {report.loss_after:.5f}"
    found += f" ({report.loss_full:.5f} as trained; {report.tokens:,} tokens)"
    return found if report.kept else f"{found}; it did not fall, so the codes are as they were"


def _compress_all(
    adapters: Path,
    out: Path,
    options: CompressOptions,
    base: Path | None,
    data: Path | None,
    jobs: int,
    cluster: Any,
) -> None:
    from bitloft.bulk import compress_all

    with progress("packing") as step:
        report = compress_all(adapters, out, options, base=base, data=data, jobs=jobs, cluster=cluster, progress=step)
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


def rebase(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="a plain or packed adapter")],
    to: Annotated[Path, typer.Option("--to", help="the packed base to move it to, of the same model")],
    data: Data,
    out: Out,
    options: RebaseOptions,
    trained_on: TrainedOn = None,
    overwrite: Overwrite = False,
) -> None:
    """Move an adapter to another quantization of its model by a short distillation; models are held whole in memory."""
    from bitloft.rebase import rebase as verb

    with progress("rebasing") as step:
        report = verb(adapter, to, data, out, options, trained_on=trained_on, overwrite=overwrite, progress=step)
    taught = "the text itself" if report.loss_teacher is None else f"{report.teacher} ({report.loss_teacher:.5f})"
    show(
        f"adapter {out}",
        {
            "held-out loss": f"{report.loss_before:.5f} -> {report.loss_after:.5f} in {report.steps} steps",
            "base alone": f"{report.loss_base:.5f} ({report.tokens:,} tokens)",
            "taught by": taught,
            "adapter": f"rank {report.rank}, plain PEFT, for {to}",
            "data": data_counts(report.data),
            "computed in": report.dtype,
            "memory": f"{size(report.model_bytes)} of models held whole",
            "notes": " ".join(report.notes) or "none",
            "time": f"{report.seconds:.1f} s",
        },
    )


def expand(
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="a packed adapter")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Turn a packed adapter back into a plain PEFT directory."""
    from bitloft.compress import expand as verb

    verb(packed, out, overwrite=overwrite)
    show(f"plain adapter {out}", {"from": str(packed)})


COMMANDS: dict[str, Callable[..., None]] = {"compress": compress, "rebase": rebase, "expand": expand}
