"""Choosing the next token of each row.

Each row draws from its own generator and its own logits, so a seeded request does not depend on its neighbours. One
generator for the batch would be a single draw instead of one per row, and would make every answer depend on the load.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitloft.serve.requests import Request

LIKELIEST = 256  # a nucleus is looked for among so many tokens first: sorting a whole vocabulary takes milliseconds


class Choice(NamedTuple):
    """A row's next token, the logarithm of its probability and (token, logprob) of the likeliest, where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Float[Tensor, "rows vocabulary"], requests: list[Request]) -> list[Choice]:
    """The next token of every row: the likeliest at temperature 0, else drawn from what top_k and top_p leave."""
    likeliest: list[int] = logits.argmax(-1).tolist()
    return [
        _told(row, token if request.generator is None else _draw(row, request), request.sampling.logprobs)
        for token, row, request in zip(likeliest, logits, requests, strict=True)
    ]


def _told(logits: Float[Tensor, " vocabulary"], token: int, count: int | None) -> Choice:
    if count is None:
        return Choice(token)
    log = logits.float().log_softmax(-1)
    top = log.topk(count)
    return Choice(token, float(log[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def _draw(logits: Float[Tensor, " vocabulary"], request: Request) -> int:
    sampling = request.sampling
    p = (logits.float() / sampling.temperature).softmax(-1).cpu()
    weights, tokens = nucleus(p, sampling.top_p, sampling.top_k)
    return int(tokens[torch.multinomial(weights, 1, generator=request.generator)])


def nucleus(
    p: Float[Tensor, " vocabulary"], top_p: float, top_k: int = 0
) -> tuple[Float[Tensor, " kept"], Int[Tensor, " kept"]]:
    """The probabilities and tokens that remain: of the ``top_k`` likeliest (0: of all) the fewest that reach ``top_p``
    together. Likeliest first unless everything remains; not normalized again."""
    most = min(top_k, len(p)) if top_k > 0 else len(p)
    if top_p >= 1 and most == len(p):
        return p, torch.arange(len(p))
    weights, tokens = p.topk(min(most, LIKELIEST))
    if most > LIKELIEST and float(weights.sum()) < top_p:
        weights, tokens = p.topk(most)
    total = float(weights.sum()) if top_k > 0 else 1.0
    kept = max(int((weights.cumsum(0) - weights < top_p * total).sum()), 1)
    return weights[:kept], tokens[:kept]


def sound(logits: Float[Tensor, "rows vocabulary"]) -> Bool[Tensor, " rows"]:
    """Rows without NaN and +infinity (-infinity is how a model says never), and not all one number: that is what is
    left of a hidden state whose square overflowed. A NaN is the largest number of its row, and compares with none."""
    most = logits.amax(-1)
    return (most < torch.inf) & (most > logits.amin(-1))
