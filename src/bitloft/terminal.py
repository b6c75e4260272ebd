"""What commands share on a terminal: tables of facts, and a progress bar that speaks on a pipe too."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> "Table":
    from rich.table import Table

    made = Table(*columns)
    for row in rows:
        made.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return made


def show(title: str, facts: Mapping[str, object]) -> None:
    """A titled list of facts."""
    from rich.table import Table

    made = Table(title=title, show_header=False, title_justify="left")
    for key, value in facts.items():
        made.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    emit(made)


def emit(item: Any) -> None:
    from rich.console import Console

    Console().print(item)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with time left on stderr; on a pipe, a line every ten seconds. Yields step(done, total, name)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        spoken = time.monotonic()

        def step(done: int, total: int, name: str) -> None:
            nonlocal spoken
            bar.update(task, completed=done, total=total, description=f"{title} {name}")
            if not console.is_terminal and (time.monotonic() - spoken > 10 or done == total):
                spoken = time.monotonic()
                console.print(f"{title}: {done} of {total} ({name})", highlight=False)

        yield step
