"""Choosing tokens: greedy, the nucleus, seeds that do not depend on the neighbours, rows with broken numbers."""

import asyncio
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.serve.requests import Request, Sampling
from bitloft.serve.sampling import choose, nucleus, sound
from bitloft.serve.store import Handle
from bitloft.serve.text import TextStream


def request(**sampling: float) -> Request:
    loop = asyncio.new_event_loop()
    loop.close()
    return Request([1], Handle("base", None), Sampling(8, **sampling), TextStream(None), loop)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 50), top_p=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(size: int, top_p: float, seed: int) -> None:
    p = torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    kept, tokens = nucleus(p, top_p)
    assert torch.equal(kept, p[tokens])
    assert len(set(tokens.tolist())) == len(tokens)
    assert kept.sum() >= top_p - 1e-5
    assert kept.sum() - kept.min() < top_p + 1e-5  # without the least of them it would not reach top_p
    left = torch.ones(size, dtype=torch.bool).index_fill(0, tokens, False)
    assert not bool(left.any()) or kept.min() >= p[left].max()


def test_a_nucleus_larger_than_the_first_look() -> None:
    p = torch.full((1000,), 1e-3)
    kept, tokens = nucleus(p, 0.9)
    assert 899 <= len(kept) <= 901
    assert len(set(tokens.tolist())) == len(kept)


def test_top_k_comes_before_top_p() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert nucleus(p, 1.0, 2)[1].tolist() == [1, 3]
    assert nucleus(p, 0.5, 2)[1].tolist() == [1]  # of the two that remain, the first holds four sevenths
    assert nucleus(p, 1.0, 9)[1].tolist() == [0, 1, 2, 3]


def test_logprobs_of_the_chosen_and_the_likeliest() -> None:
    logits = torch.randn(2, 40)
    plain, told = choose(logits, [request(), request(logprobs=2)])
    assert plain == (int(logits[0].argmax()), None, ())
    log = logits[1].log_softmax(-1)
    assert told.logprob == pytest.approx(float(log.max()))
    assert [token for token, _ in told.top] == log.topk(2).indices.tolist()
    assert choose(logits[:1], [request(logprobs=0)])[0].top == ()


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(5, 40)
    assert [c.token for c in choose(logits, [request() for _ in range(5)])] == logits.argmax(-1).tolist()


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
    drawn = Counter(choose(logits, [watched])[0].token for _ in range(3000))
    expected = (logits[0] / 0.5).softmax(-1)
    for token in range(3):
        assert drawn[token] / 3000 == pytest.approx(float(expected[token]), abs=0.03)


def test_top_p_bars_the_unlikely() -> None:
    logits, watched = torch.tensor([[3.0, 2.9, 0.0, 0.0, 0.0]]), request(temperature=1.0, top_p=0.6, seed=0)
    assert {choose(logits, [watched])[0].token for _ in range(200)} == {0, 1}


def test_sound_rows() -> None:
    logits = torch.randn(5, 3)
    logits[1, 2], logits[2, 0], logits[3, 1], logits[4] = torch.nan, torch.inf, -torch.inf, 0.0
    assert sound(logits).tolist() == [True, False, False, True, False]
