"""Tables show the same cells everywhere, plots are inside the page, and nothing on the page is fetched."""

import base64
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitloft.errors import OptionError
from bitloft.report import Figure, Section, Table, bars, is_number, lines, page, pm, size, write

TABLE = Table(("model", "stored", "perplexity"), (("fp16", "269 MB", "29.19 ± 0.40"), ("lm2|64", "71.3 MB", "104")))


def test_text_aligns_numbers_to_the_right() -> None:
    assert TABLE.text().splitlines() == [
        "model    stored    perplexity",
        "------  -------  ------------",
        "fp16     269 MB  29.19 ± 0.40",
        "lm2|64  71.3 MB           104",
    ]


def test_markdown_escapes_pipes_and_marks_number_columns() -> None:
    assert TABLE.markdown().splitlines() == [
        "| model | stored | perplexity |",
        "| --- | ---: | ---: |",
        "| fp16 | 269 MB | 29.19 ± 0.40 |",
        "| lm2\\|64 | 71.3 MB | 104 |",
    ]


def test_a_row_of_another_length_is_named() -> None:
    with pytest.raises(OptionError, match=r"row 2 of a table has 1 cells, its header 2\."):
        Table(("a", "b"), (("1", "2"), ("3",)))


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_html_escapes_every_cell(rows: list[tuple[str, str]]) -> None:
    text = Table(("a", "<b>"), tuple(rows)).html()
    cells = re.findall(r"(?s)<t[dh](?: [^>]*)?>(.*?)</t[dh]>", text)
    assert len(cells) == 2 + 2 * len(rows)
    assert not [cell for cell in cells if "<" in cell or ">" in cell]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (71_349_000, "71.3 MB"), (269_060_552, "269 MB"), (999_600, "1 MB")],
)
def test_size_has_three_digits(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (36.6187, 0.4123, "36.62 ± 0.41"),
        (3.60012, 0.01234, "3.600 ± 0.012"),
        (250.3, 17.2, "250 ± 17"),
        (250.3, 1.72, "250.3 ± 1.7"),
        (5.0, None, "5.00"),
    ],
)
def test_pm_gives_two_digits_of_the_error(value: float, error: float | None, text: str) -> None:
    assert pm(value, error) == text


@pytest.mark.parametrize(
    ("text", "number"), [("29.19 ± 0.40", True), ("71.3 MB", True), ("—", True), ("lm2:64", False)]
)
def test_is_number(text: str, number: bool) -> None:
    assert is_number(text) is number


def test_plots_are_svg_with_their_words_and_equal_for_equal_input() -> None:
    def draw() -> Figure:
        return bars({"docs": {"before": (40.0, 0.5), "after <x>": (12.0, 0.25)}}, unit="perplexity", caption="c")

    svg = draw().svg
    assert svg == draw().svg
    root = ElementTree.fromstring(svg)
    words = "".join(root.itertext())
    assert "perplexity" in words
    assert "docs: after <x>" in words
    assert "loss" in lines({"a": [(0.0, 1.0), (1.0, 0.5)]}, x="step", y="loss", caption="c").svg


def test_a_page_fetches_nothing() -> None:
    figure = lines({"a": [(0.0, 1.0), (1.0, 0.5)]}, x="step", y="loss", caption='loss "a"')
    text = page("A <run>", [Section("Found", ("one & two", TABLE, figure))])
    assert "<title>A &lt;run&gt;</title>" in text
    assert "one &amp; two" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert [source[:26] for source in sources] == ["data:image/svg+xml;base64,"]
    assert base64.b64decode(sources[0].partition(",")[2]).decode() == figure.svg
    assert "http" not in text.replace(sources[0], "")


def test_plots_without_matplotlib_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"plots need matplotlib; install bitloft\[demo\] with -c constraints\.txt\."):
        lines({}, x="x", y="y", caption="c")


def test_write_leaves_only_the_file(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "report.html", "old")
    write(tmp_path / "deep" / "report.html", "new")
    assert [file.read_text() for file in (tmp_path / "deep").iterdir()] == ["new"]
