"""What a run found, for people: tables (terminal, Markdown, HTML), plots, and one HTML page that needs no other file.

A Table holds text cells, so that the terminal, the README and the page show the same digits; numbers are rounded once,
by ``pm``, ``size`` and their like, where the table is made. Plots are SVG images inside the page as data URIs, not
inline SVG: two inline figures of matplotlib share element ids. Plots need matplotlib (extra ``demo``), tables nothing.
"""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitloft.errors import OptionError

NUMERIC = set("0123456789.,+-± %x×eE~≤≥/—")
COLORS = ("#3b6ea8", "#d1793c", "#4a9a6a", "#a8508c", "#8a8a8a")
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption, caption { color: #777; font-size: .9rem; text-align: left; caption-side: bottom; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text cells below ``columns``. Raises OptionError for a row of another length, naming it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise OptionError(f"row {number} of a table has {len(row)} cells, its header {len(self.columns)}.")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Columns that hold numbers, which are set to the right."""
        cells = [[row[i] for row in self.rows if row[i]] for i in range(len(self.columns))]
        return tuple(bool(column) and all(is_number(cell) for cell in column) for column in cells)

    def text(self) -> str:
        """For a terminal: columns aligned by spaces."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        rule = tuple("-" * width for width in widths)
        return "\n".join("  ".join(self._aligned(line, widths)).rstrip() for line in (self.columns, rule, *self.rows))

    def markdown(self) -> str:
        """For a README: a pipe table, with pipes in cells escaped."""
        rule = tuple("---:" if right else "---" for right in self.numeric)
        lines = ([cell.replace("|", "\\|") for cell in line] for line in (self.columns, rule, *self.rows))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        head = self._html_row("th", self.columns)
        body = "\n".join(self._html_row("td", row) for row in self.rows)
        note = f"<caption>{html.escape(self.note)}</caption>" if self.note else ""
        return f'<div class="wide"><table>{note}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'

    def _aligned(self, cells: Sequence[str], widths: Sequence[int]) -> list[str]:
        columns = zip(cells, widths, self.numeric, strict=True)
        return [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns]

    def _html_row(self, tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="number"' if right else "" for right in self.numeric)
        row = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(row)}</tr>"


@dataclass(frozen=True)
class Figure:
    """A plot as SVG text, and what it shows in words."""

    svg: str
    caption: str

    def html(self) -> str:
        data = base64.b64encode(self.svg.encode()).decode()
        caption = html.escape(self.caption)
        image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class Section:
    """A heading, then text paragraphs (str), tables and figures in order."""

    title: str
    parts: tuple["str | Table | Figure", ...]

    def html(self) -> str:
        parts = (f"<p>{html.escape(part)}</p>" if isinstance(part, str) else part.html() for part in self.parts)
        return f"<h2>{html.escape(self.title)}</h2>\n" + "\n".join(parts)


def page(title: str, sections: Sequence[Section]) -> str:
    """One HTML page with everything inside: no script, no style sheet, no image file, nothing fetched."""
    body = "\n".join(section.html() for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def write(file: Path, text: str) -> None:
    """Write ``text`` beside ``file``, then rename: a reader never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def bars(groups: Mapping[str, Mapping[str, tuple[float, float]]], *, unit: str, caption: str) -> Figure:
    """Grouped horizontal bars with error bars: group -> label -> (value, standard error) in ``unit``."""
    figure, axes = _axes(0.8 + 0.32 * sum(map(len, groups.values())) + 0.3 * len(groups))
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    position, ticks = 0.0, []
    for name, group in groups.items():
        for label, (value, error) in group.items():
            axes.barh(-position, value, xerr=error or None, height=0.8, color=COLORS[labels.index(label) % len(COLORS)])
            axes.text(value + error, -position, f" {value:.4g}", va="center", fontsize=8)
            ticks.append((-position, f"{name}: {label}" if name else label))
            position += 1
        position += 0.6
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    return Figure(_svg(figure), caption)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, caption: str) -> Figure:
    """One line per name over (x, y) points."""
    figure, axes = _axes(3.4)
    for (name, points), color in zip(series.items(), COLORS * len(series), strict=False):
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, color=color)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    return Figure(_svg(figure), caption)


def points(series: Mapping[str, Sequence[tuple[float, float, float]]], *, x: str, y: str, caption: str) -> Figure:
    """One line of marks per name over (x, y, standard error of y), with error bars."""
    figure, axes = _axes(4.2)
    for (name, found), color in zip(series.items(), COLORS * len(series), strict=False):
        xs, ys, errors = zip(*found, strict=True)
        axes.errorbar(xs, ys, yerr=errors, label=name, color=color, marker="o", markersize=4, capsize=3, linewidth=1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    return Figure(_svg(figure), caption)


def size(count: int) -> str:
    """Bytes in decimal units with three digits: 71.3 MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.3g} {units[0]}" if value < 100 else f"{value:.0f} {units[0]}"


def pm(value: float, error: float | None) -> str:
    """A value with its standard error, both to the error's first two digits: 36.62 ± 0.41; alone where it has none."""
    if not error:
        return f"{value:.2f}"
    digits = next((n for n in range(6) if error * 10**n >= 1), 6)
    digits += digits > 0 or error < 10
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def is_number(text: str) -> bool:
    """Whether a cell is a number, perhaps with a sign, an error or a unit such as MB, s or %."""
    words = text.split()
    return bool(words) and words[0][0] in "0123456789+-−.—" and set(words[0]) <= NUMERIC | {"−"} and len(words) <= 4


def _axes(height: float) -> tuple[Any, Any]:
    """A matplotlib figure of 8 by ``height`` inches without touching its global state."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise OptionError("plots need matplotlib; install bitloft[demo] with -c constraints.txt.") from error
    figure = Canvas(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as SVG text, equal for equal input (no date, fixed ids), its words kept as text."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "bitloft", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
