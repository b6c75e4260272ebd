"""Choosing the next token of each row.

Each row draws from its own generator and its own logits, so a seeded request does not depend on its neighbours. One
generator for the batch would be a single draw instead of one per row, and would make every answer depend on the load.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitloft.serve.requests import Request


def choose(logits: Float[Tensor, "rows vocabulary"], requests: list[Request]) -> list[int]:
    """The next token of every row: the likeliest at temperature 0, else drawn from the top_p nucleus."""
    likeliest: list[int] = logits.argmax(-1).tolist()
    return [
        token if request.generator is None else _draw(row, request)
        for token, row, request in zip(likeliest, logits, requests, strict=True)
    ]


def _draw(logits: Float[Tensor, " vocabulary"], request: Request) -> int:
    p = nucleus((logits.float() / request.sampling.temperature).softmax(-1).cpu(), request.sampling.top_p)
    return int(torch.multinomial(p, 1, generator=request.generator))


def nucleus(p: Float[Tensor, " vocabulary"], top_p: float) -> Float[Tensor, " vocabulary"]:
    """``p`` with all but the likeliest tokens that reach ``top_p`` together set to zero (not normalized again)."""
    if top_p >= 1:
        return p
    ordered, order = p.sort(descending=True, stable=True)
    beyond: Int[Tensor, " vocabulary"] = order[ordered.cumsum(0) - ordered >= top_p]
    return p.index_fill(0, beyond, 0.0)


def sound(logits: Float[Tensor, "rows vocabulary"]) -> Bool[Tensor, " rows"]:
    """Rows without NaN and +infinity; -infinity is how a model says never."""
    return (logits < torch.inf).all(-1)
