"""Choosing tokens: greedy, the nucleus, seeds that do not depend on the neighbours, rows with broken numbers."""

import asyncio
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.serve.requests import Request, Sampling
from bitloft.serve.sampling import choose, nucleus, sound
from bitloft.serve.text import TextStream


def request(**sampling: float) -> Request:
    loop = asyncio.new_event_loop()
    loop.close()
    return Request([1], None, Sampling(8, **sampling), TextStream(None), loop)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 50), top_p=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(size: int, top_p: float, seed: int) -> None:
    p = torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    kept = nucleus(p, top_p)
    chosen = kept > 0
    assert torch.equal(kept[chosen], p[chosen])
    assert kept.sum() >= top_p - 1e-5
    assert kept.sum() - kept[chosen].min() < top_p + 1e-5  # without the least of them it would not reach top_p
    assert p[~chosen].numel() == 0 or kept[chosen].min() >= p[~chosen].max()


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(5, 40)
    assert choose(logits, [request() for _ in range(5)]) == logits.argmax(-1).tolist()


def test_a_seed_does_not_depend_on_the_neighbours() -> None:
    logits = torch.randn(6, 40)
    alone = [choose(logits[:1], [r])[0] for r in [request(temperature=1.0, seed=7)] for _ in range(20)]
    watched, others = request(temperature=1.0, seed=7), [request(temperature=1.0, seed=i) for i in range(5)]
    assert [choose(logits, [watched, *others])[0] for _ in range(20)] == alone
    assert len(set(alone)) > 3
    again = request(temperature=1.0, seed=8)
    assert [choose(logits[:1], [again])[0] for _ in range(20)] != alone


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(1, 1000)
    one, two = request(temperature=1.0), request(temperature=1.0)
    assert [choose(logits, [one])[0] for _ in range(8)] != [choose(logits, [two])[0] for _ in range(8)]


def test_frequencies_follow_the_tempered_softmax() -> None:
    logits, watched = torch.tensor([[2.0, 1.0, 0.0, -9.0]]), request(temperature=0.5, seed=0)
    drawn = Counter(choose(logits, [watched])[0] for _ in range(3000))
    expected = (logits[0] / 0.5).softmax(-1)
    for token in range(3):
        assert drawn[token] / 3000 == pytest.approx(float(expected[token]), abs=0.03)


def test_top_p_bars_the_unlikely() -> None:
    logits, watched = torch.tensor([[3.0, 2.9, 0.0, 0.0, 0.0]]), request(temperature=1.0, top_p=0.6, seed=0)
    assert {choose(logits, [watched])[0] for _ in range(200)} == {0, 1}


def test_sound_rows() -> None:
    logits = torch.zeros(4, 3)
    logits[1, 2], logits[2, 0], logits[3, 1] = torch.nan, torch.inf, -torch.inf
    assert sound(logits).tolist() == [True, False, False, True]
