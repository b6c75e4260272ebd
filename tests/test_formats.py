"""Formats: spellings, levels, and the layout that everything else trusts."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitloft.errors import FormatError
from bitloft.formats import LLOYD_MAX, NF4_LEVELS, Format, _normal_float, layout

FORMATS = ["nf4:64", "nf3:64", "nf2:64", "lm2:64", "lm3:64", "lm4:64", "uniform2:64", "uniform3:64", "uniform4:64",
           "sign:128", "lm2:row", "lm4:unit", "sign:unit",
           "uniform2:tensor", "uniform4:tensor", "book2:64", "book3:64", "nf4:64+dq", "lm2:64+dq", "uniform3:64+dq",
           "nf2:64+shift", "lm2:64+shift", "uniform2:64+shift", "sign:64+shift", "book2:row+dq+shift",
           "uniform4:64+dq+shift", "int8:64", "int8:row", "half:row", "half:unit",
           "trellis1:row", "trellis2:unit", "trellis3:row", "trellis4:unit", "trellis2:64",
           "trellis3:24"]  # fmt: skip


@pytest.mark.parametrize("spelling", FORMATS)
def test_spelling_round_trips(spelling: str) -> None:
    assert str(Format.parse(spelling)) == spelling
    assert Format.parse(Format.parse(spelling)) == Format.parse(spelling)


@given(
    st.sampled_from(["nf", "lm", "uniform", "sign", "book", "int", "half", "trellis"]),
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.sampled_from([8, 24, 64, 4096, 0, -1, -2]),
    st.booleans(),
    st.booleans(),
)
def test_every_format_that_can_be_made_parses_back(family: str, bits: int, group: int, dq: bool, shift: bool) -> None:
    try:
        fmt = Format(family, bits, group, dq, shift)
    except FormatError:
        return
    assert Format.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    "spelling",
    [
        "nf5:64",
        "lm2",
        "lm2:",
        "sign1:64",
        "int4:64",
        "lm2:0",
        "lm:64",
        "",
        "nf1:64",
        "lm2:64+shift+dq",
        "int:64",
        "half16:row",
    ],
)
def test_unknown_spellings_are_refused_by_name(spelling: str) -> None:
    with pytest.raises(FormatError, match=r"format .*use nf2\.\.4"):
        Format.parse(spelling)


def test_groups_fill_bytes() -> None:
    with pytest.raises(FormatError, match="group 12 is not a multiple of 8"):
        Format.parse("lm2:12")
    with pytest.raises(FormatError, match="needs a scale"):
        Format.parse("uniform2:unit")
    with pytest.raises(FormatError, match="use half:row or half:unit"):
        Format.parse("half:64")
    with pytest.raises(FormatError, match="only uniform codes take one range per tensor"):
        Format.parse("lm2:tensor")
    with pytest.raises(FormatError, match="need groups"):
        Format.parse("uniform2:tensor+dq")


def test_nf4_is_the_published_table() -> None:
    """LoftQ's recipe and bitsandbytes' constants agree to float precision."""
    assert _normal_float(4) == pytest.approx(NF4_LEVELS, abs=2e-7)


def test_nf2_and_nf3_are_loftqs() -> None:
    assert Format.parse("nf2:64").levels == pytest.approx((-1, 0, 0.3379, 1), abs=1e-4)
    expected = (-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1)
    assert Format.parse("nf3:64").levels == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_levels_meet_both_conditions(bits: int) -> None:
    """Each level is the mean of a standard normal between the middles of its neighbors."""
    half = LLOYD_MAX[bits]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(half)), math.inf]

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    for level, low, high in zip(half, edges, edges[1:], strict=False):
        mean = (density(low) - density(high)) / (below(high) - below(low))
        assert level == pytest.approx(mean, abs=2e-6)


def test_layout_of_three_bits_is_exactly_three() -> None:
    parts = layout((5, 100), Format.parse("uniform3:64"))
    assert parts["codes"].shape == (5, 128 * 3 // 8)
    assert parts["scales"].shape == (5, 2)
    assert parts["codes"].nbytes == 5 * 48


def test_suffixes_cost_what_they_say() -> None:
    """+dq: 8 bits per scale and 32 per 256; +shift: 16 bits per group."""

    def bits(spelling: str) -> float:
        return (
            8 * sum(p.nbytes for n, p in layout((256, 4096), Format.parse(spelling)).items() if n != "exponent") / 2**20
        )

    assert bits("nf4:64+dq") == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert bits("lm2:64+shift") == pytest.approx(2.5)
    assert bits("uniform2:tensor") == pytest.approx(2, abs=1e-4)
    assert bits("book2:64") == pytest.approx(2.25, abs=1e-4)


def test_a_scalar_has_no_layout() -> None:
    with pytest.raises(FormatError, match="scalar"):
        layout((), Format.parse("lm2:64"))
