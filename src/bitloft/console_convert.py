"""What `bitloft merge`, `bitloft convert` and `bitloft start-for` print; see console.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bitloft.console import Base, Out, Overwrite
from bitloft.options import ConvertOptions, MergeOptions
from bitloft.report import size
from bitloft.terminal import progress, show

Text = Annotated[
    Path | None, typer.Option("--data", help="FILE.jsonl or FILE.txt to measure the loss on, before, after")
]


def merge(
    base: Base,
    adapter: Annotated[Path, typer.Option("--adapter", help="plain or packed adapter of this base")],
    out: Out,
    options: MergeOptions,
    data: Text = None,
    overwrite: Overwrite = False,
) -> None:
    """Work an adapter into a packed base, quantize again, and say what that changed."""
    from bitloft.merge import merge as verb

    with progress("merging") as step:
        report = verb(base, adapter, out, options, data=data, overwrite=overwrite, progress=step)
    losses = "not measured (give --data)"
    if report.loss_after is not None:
        losses = (
            f"{report.loss_base:.5f} base, {report.loss_before:.5f} with the adapter, {report.loss_after:.5f} merged"
        )
    show(
        f"base {out}",
        {
            "merged": f"{len(report.matrices)} matrices; {report.untouched} packed ones keep every byte",
            "change": _spread([m.change for m in report.matrices]) + " of the merged matrix (relative Frobenius norm)",
            "of the adapter": _spread([m.of_adapter for m in report.matrices]) + " times its own norm",
            "loss per token": losses,
            "stored": size(report.stored_bytes),
            "fingerprint": report.fingerprint,
            **({} if report.mismatch is None else {"adapter was": report.mismatch}),
            "time": f"{report.seconds:.1f} s",
        },
    )


def convert(
    base: Base,
    out: Out,
    options: ConvertOptions,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="plain or packed adapter of this base")] = None,
    source: Annotated[str | None, typer.Option("--source", help="portable: the original model, to measure on")] = None,
    data: Text = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a base, or an adapter with it, into something that works without bitloft."""
    from bitloft.convert import convert as verb

    with progress("converting") as step:
        report = verb(base, out, options, adapter=adapter, source=source, data=data, overwrite=overwrite, progress=step)
    lacks = {
        "dense": "rounding to its dtype changed each matrix by",
        "portable": "the base differs from the original by |W - Q - s0*B0*A0| / |W|",
        "bitsandbytes": "change of each matrix",
        "gptq": "rounding scales to float16 changed each matrix by",
    }
    losses = ", ".join(f"{loss:.5f} {name}" for name, loss in report.losses.items())
    show(
        f"{report.to} {out}",
        {
            lacks[report.to]: _spread(list(report.changes.values())),
            "rank": "no adapter" if report.rank is None else report.rank,
            "loss per token": losses or "not measured",
            "notes": " ".join(report.notes) or "none",
            "stored": size(report.stored_bytes),
            "time": f"{report.seconds:.1f} s",
        },
    )


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4g} on average, {max(values):.4g} at most" if values else "unknown"


def start_for(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="bitsandbytes (4 bit) or GPTQ folder, or .gguf file")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="the 16-bit model that the base was made of")],
    out: Out,
    rank: Annotated[int, typer.Option("--rank", help="rank of the start")] = 16,
    target: Annotated[list[str] | None, typer.Option("--target", help="only modules that match; repeat")] = None,
    seed: Annotated[int, typer.Option("--seed", help="seed of the randomized SVD")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Find the LoRA start that repairs a base which another tool quantized; written as a PEFT adapter for it."""
    from bitloft.starts import start_for as verb

    with progress("solving") as step:
        report = verb(base, model, out, rank, target=target or (), seed=seed, overwrite=overwrite, progress=step)
    before = sum(m.error_before for m in report.matrices) / len(report.matrices)
    after = sum(m.error_after for m in report.matrices) / len(report.matrices)
    show(
        f"start {out}",
        {
            "base": f"{report.base} ({report.kind}); the start fits no other",
            "rank": f"{report.rank}, scaling 1",
            "mean error": f"{before:.4f} as quantized, {after:.4f} with the start ({len(report.matrices)} matrices)",
            "time": f"{report.seconds:.1f} s",
        },
    )


COMMANDS: dict[str, Callable[..., None]] = {"merge": merge, "convert": convert, "start-for": start_for}
