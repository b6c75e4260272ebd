"""The commands around a server on a terminal: run one, and put one under load."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bitloft.console import Address, Base, cluster_of
from bitloft.errors import OptionError
from bitloft.options import LoadOptions, ServeOptions
from bitloft.terminal import progress, show


def serve(
    base: Base,
    options: ServeOptions,
    adapter_dir: Annotated[
        Path | None, typer.Option("--adapter-dir", help="directory whose subdirectories are adapters")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray: replicas on a Ray cluster")] = "local",
    address: Address = None,
    replicas: Annotated[int | None, typer.Option("--replicas", help="ray: replicas, or the least of them")] = None,
    max_replicas: Annotated[int | None, typer.Option("--max-replicas", help="ray: as many where requests ask")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="ray: processors of a replica")] = None,
    scale_up: Annotated[
        float | None, typer.Option("--scale-up", help="ray: seconds of too much until a replica is added (30)")
    ] = None,
    scale_down: Annotated[
        float | None, typer.Option("--scale-down", help="ray: seconds of too little until one is removed (600)")
    ] = None,
) -> None:
    """Serve a base and its adapters over an OpenAI-shaped HTTP interface."""
    cluster = cluster_of(engine, address, None, None, threads or 1)
    given = {"--replicas": replicas, "--max-replicas": max_replicas, "--threads": threads, "--scale-up": scale_up,
             "--scale-down": scale_down}  # fmt: skip
    if cluster is not None:
        from bitloft.serve.deployment import Replicas
        from bitloft.serve.deployment import serve as spread

        delays = {name: value for name, value in (("up", scale_up), ("down", scale_down)) if value is not None}
        wanted = Replicas(replicas or 1, max_replicas, threads or 1, **delays)
        spread(base, adapter_dir, options, wanted, cluster)
        return
    for flag, value in given.items():
        if value is not None:
            raise OptionError(f"{flag} is for --engine ray; leave it out.")
    from bitloft.serve.http import serve as verb

    verb(base, adapter_dir, options)


def bench_serve(
    options: LoadOptions,
    url: Annotated[str, typer.Argument(metavar="URL", help="the server, such as http://127.0.0.1:8000")],
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="one prompt a line, instead of made-up ones")
    ] = None,
) -> None:
    """Put your own server under load and check every answer; the last line is one JSON object.

    Exits with 1 where an answer was wrong.
    """
    from bitloft.serve.load import load

    with progress("asking") as step:
        report = load(url, options, _prompts(prompt_file), step)
    asked = "checked against the same request asked alone" if options.check else "not checked"
    wrong = f"{report.wrong_answers} wrong, of these {report.wrong_by_mix_up} are another model's answer"
    show(
        url,
        {
            "answered": f"{report.answered} of {report.requests} in {report.seconds:.1f} s, {report.models} models",
            "answers": f"{report.checked} {asked}, {wrong}" if options.check else asked,
            "errors": ", ".join(f"{count} x {code}" for code, count in report.errors.items()) or "none",
            "first token": _times(report.first_token_ms),
            "per token": _times(report.token_ms),
            "whole answer": _times(report.whole_ms),
            "refused": f"{report.refused}, told after {_times(report.refused_ms)}" if report.refused else "none",
            "throughput": f"{report.requests_per_second:.2f} requests/s, {report.tokens_per_second:.1f} tokens/s",
            "goodput": f"{report.goodput_requests_per_second:.2f} requests/s, "
            f"{report.goodput_tokens_per_second:.1f} tokens/s (right and in time)",
        }
        | ({"generator was late": _times(report.generator_lag_ms)} if report.generator_lag_ms else {})
        | {f"wrong answer {i}": text for i, text in enumerate(report.examples, 1)},
    )
    typer.echo(json.dumps(asdict(report)))
    if report.wrong_answers:
        raise typer.Exit(1)


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items()) or "none"


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read prompts from {file} ({error}); give a text file with one a line.") from None
    if not found:
        raise OptionError(f"{file} holds no prompt; give a text file with one a line.")
    return found


COMMANDS: dict[str, Callable[..., Any]] = {"serve": serve, "bench-serve": bench_serve}
