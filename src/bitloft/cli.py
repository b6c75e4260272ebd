"""The command line: routes only. Flags are made from the options dataclasses, work happens in the verbs.

Expected errors print one line and exit with 2. Nothing heavy is imported before a command runs, so ``--help`` is quick.
"""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, Optional, get_args, get_type_hints

import typer

from bitloft import (
    __version__,
    console,
    console_adapter,
    console_convert,
    console_plan,
    console_serve,
    console_tasks,
)
from bitloft.errors import BitloftError

app = typer.Typer(
    name="bitloft",
    help="Quantize a base, fine-tune on it, quantize the adapters, serve thousands of them from one base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(name: str, run: Callable[..., None]) -> None:
    """Add ``run`` as a command; its parameter named ``options`` becomes one flag per field of that dataclass."""
    hints = get_type_hints(run, include_extras=True)
    kind = hints.get("options")

    def call(**given: Any) -> None:
        if kind is not None:
            chosen = {f.name: given.pop(f.name) for f in fields(kind)}
            given["options"] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})
        run(**given)

    parameters = [
        p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(run).parameters.values()
        if p.name != "options"
    ]
    parameters += _flags(kind) if kind is not None else []
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = inspect.getdoc(run)
    app.command(name)(call)


def _flags(kind: type) -> list[inspect.Parameter]:
    """One keyword parameter per field: tuples become repeatable flags, None an optional value."""
    hints: dict[str, Any] = get_type_hints(kind)
    flags = []
    for f in fields(kind):
        hint: Any = hints[f.name]
        default: Any = None if f.default is MISSING else f.default
        if isinstance(default, tuple):
            hint, default = list[str], list(default)
        elif type(None) in get_args(hint):
            hint = Optional[next(a for a in get_args(hint) if a is not type(None))]  # noqa: UP045 (typer's spelling)
        elif str in get_args(hint):  # a number or a word: the options read the number
            hint, default = str, str(default)
        flag = "--" + f.name.replace("_", "-")
        flag += flag.replace("--", "/--no-") if default is True else ""  # what is on by default needs a way off
        about = typer.Option(flag, help=f.metadata["help"])
        annotation: Any = Annotated[hint, about]
        flags.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return flags


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


for _group in (console, console_tasks, console_serve, console_adapter, console_convert, console_plan):
    for _name, _run in _group.COMMANDS.items():
        command(_name, _run)


def main() -> None:
    """Entry point of the ``bitloft`` script."""
    # set before transformers is imported: its advice about loading speaks of things that the verbs report themselves
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except BitloftError as error:
        print(f"bitloft: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bitloft: interrupted; nothing half-written was left (--resume goes on).", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
