"""Bits per matrix under a byte budget: inside it, close to it, better than one width, close to the optimum."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.errors import OptionError
from bitloft.kernels.ops import decode, encode
from bitloft.solvers.allocate import Choice, add, allocate, measure, stored_bytes, widths_of

LM = ("lm2:64", "lm3:64", "lm4:64")


def measured(count: int, seed: int = 0) -> tuple[dict[str, tuple[Choice, ...]], int]:
    """Choices of random matrices of different sizes and magnitudes, and how many weights they hold."""
    generator = torch.Generator().manual_seed(seed)
    choices, weights = {}, 0
    for i in range(count):
        rows = int(torch.randint(1, 5, (1,), generator=generator)) * 16
        weight = torch.randn(rows, 128, generator=generator) * 2.0 ** float(torch.randn(1, generator=generator))
        choices[f"m{i}"] = measure(weight, LM)
        weights += weight.numel()
    return choices, weights


def test_a_measured_choice_is_what_encode_stores() -> None:
    weight = torch.randn(48, 100)
    for choice in measure(weight, LM):
        packed = encode(weight, choice.format)
        assert choice.bytes == packed.nbytes == stored_bytes((48, 100), choice.format)
        assert choice.error == pytest.approx(float((weight - decode(packed)).square().sum()), rel=1e-5)


@pytest.mark.parametrize("target", [2.3, 2.5, 3.0, 3.7, 4.2])
def test_the_target_is_met_within_a_hundredth_and_scales_count(target: float) -> None:
    choices, weights = measured(40)
    found = allocate(choices, weights, target)
    by_name = {name: {c.format: c for c in options} for name, options in choices.items()}
    stored = sum(by_name[name][fmt].bytes for name, fmt in found.formats.items())
    assert found.true_bits == 8 * stored / weights
    assert 0.99 * target <= found.true_bits <= target
    assert found.error == pytest.approx(sum(by_name[n][f].error for n, f in found.formats.items()))
    assert found.uniform_bits <= target * 1.001
    assert found.error <= found.uniform_error


def test_the_width_that_the_target_names_is_compared_with() -> None:
    """lm3:64 takes 3.25 bits and four bytes a matrix; the allocation itself stays below the target."""
    choices = {f"m{i}": measure(torch.randn(128, 256) * (1 + i % 3), LM) for i in range(30)}
    found = allocate(choices, 30 * 128 * 256, 3.25)
    assert found.uniform == "lm3:64"
    assert 3.25 < found.uniform_bits < 3.253
    assert found.true_bits <= 3.25
    assert found.error < found.uniform_error


def test_louder_matrices_get_more_bits() -> None:
    choices = {f"m{i}": measure(torch.randn(64, 128) * scale, LM) for i, scale in enumerate((0.1, 1.0, 10.0))}
    found = allocate(choices, 3 * 64 * 128, 3.3)
    assert [found.formats[f"m{i}"] for i in range(3)] == ["lm2:64", "lm3:64", "lm4:64"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_close_to_the_best_of_all_assignments(seed: int, share: float) -> None:
    """Against trying everything on five matrices: within the largest step that one matrix can take."""
    choices, weights = measured(5, seed)
    target = 2.27 + share * 1.9
    found = allocate(choices, weights, target)
    best = min(
        sum(c.error for c in combination)
        for combination in product(*choices.values())
        if sum(c.bytes for c in combination) <= int(target * weights / 8)
    )
    assert found.true_bits <= target
    assert found.error <= best + max(options[0].error - options[-1].error for options in choices.values())


def test_one_matrix_off_the_hull_still_uses_the_budget() -> None:
    """The middle width saves little per byte here, so the hull skips it; where only it fits, it is taken."""
    options = (Choice("a", 100, 10.0), Choice("b", 150, 9.0), Choice("c", 200, 1.0))
    assert allocate({"m": options}, 800, 1.6).formats == {"m": "b"}
    assert allocate({"m": options}, 800, 2.0).formats == {"m": "c"}


def test_one_width_for_all_is_taken_where_greedy_steps_end_worse() -> None:
    """Greedy spends on the small steep step first and cannot afford the large one; all at "b" is better and fits."""
    choices = {
        "x": (Choice("a", 10, 10.0), Choice("b", 20, 4.0)),
        "y": (Choice("a", 10, 100.0), Choice("b", 20, 90.0), Choice("c", 21, 89.5)),
    }
    wide = {"x": (*choices["x"], Choice("c", 100, 3.0)), "y": choices["y"]}
    found = allocate(wide, 8, 41.0)
    assert found.error <= 94.0


def test_experts_share_one_choice() -> None:
    one, two = measure(torch.randn(8, 64), LM), measure(torch.randn(8, 64), LM)
    assert add(one, two)[1] == Choice("lm3:64", one[1].bytes + two[1].bytes, one[1].error + two[1].error)


def test_widths_keep_group_and_suffixes() -> None:
    assert widths_of("nf4:64+dq") == ("nf2:64+dq", "nf3:64+dq", "nf4:64+dq")
    assert widths_of("book3:32") == ("book2:32", "book3:32")
    with pytest.raises(OptionError, match="sign codes have one only"):
        widths_of("sign:128")


@pytest.mark.parametrize("target", [2.0, 4.5])
def test_a_target_out_of_reach_is_refused(target: float) -> None:
    choices, weights = measured(5)
    with pytest.raises(OptionError, match=rf"target_bits {target} is out of reach.*from 2\.\d+ \(lm2:64\) to 4\.\d+"):
        allocate(choices, weights, target)
