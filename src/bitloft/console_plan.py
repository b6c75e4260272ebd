"""What `bitloft plan` prints; see console.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bitloft.options import PlanOptions
from bitloft.report import size, write
from bitloft.terminal import emit, progress, show, table


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="hub name, URL or folder; its config is enough")],
    options: PlanOptions,
    machine: Annotated[Path | None, typer.Option("--machine", help="TOML file of a machine or cluster")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="measure this machine into --machine first")] = False,
    page: Annotated[Path | None, typer.Option("--html", help="write tables and plots to this file too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say what quantizing, training, packing and serving would take in bytes and time, before anything is computed."""
    from bitloft.plan import page_of, rows_of
    from bitloft.plan import plan as verb

    with progress("measuring") as step:
        report = verb(model, options, machine=machine, measure=measure, progress=step)
    if page is not None:
        write(page, page_of(report, options))
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    found, outcome = report.footprint, report.outcome
    facts: dict[str, object] = {
        "base": f"{size(found.base)} on disk, {found.true_bits:.3f} true bits a weight; was {size(found.source)}",
        "in memory": f"{size(found.loaded)} loaded, {found.cache:,} bytes a token of context",
        "an adapter": f"{size(found.adapter_plain)} as trained, {size(found.adapter_packed)} packed",
        "adapters in a GiB": f"{report.adapters_per_gib:,.0f} packed, {report.adapters_per_gib_plain:,.0f} as trained",
        "machine": report.machine or "none given (--machine): no times, no replicas",
    }
    if report.throughput is not None and outcome is not None:
        facts |= {
            "replicas": f"{report.replicas} for {options.requests:g} requests/s, at most {report.throughput:.3g} each",
            "adapter memory": f"{size(report.budget)} on each",
            "hit rate": f"{outcome.hit_rate:.2%}, {outcome.loads_per_second:.3g} loads/s",
            "loaded": f"{size(int(outcome.load_traffic))} a second",
            "busiest replica": f"{outcome.busiest:.0%} of what it can answer, loader {outcome.loader:.0%}",
            "latency": ", ".join(f"{name} {seconds:.2f} s" for name, seconds in outcome.latency.items()),
            "a million requests": f"cost {outcome.cost:.4g}",
            "cache played": "request by request" if outcome.exact else "Che's approximation",
        }
    show(f"plan for {model}", facts)
    emit(table(("stage", "bytes on disk", "memory", "time", "note"), rows_of(report)))


COMMANDS: dict[str, Callable[..., None]] = {"plan": plan}
