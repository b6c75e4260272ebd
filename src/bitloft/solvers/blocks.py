"""Blocks of columns that error feedback walks one after the other, and what the errors before a block ask of it."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64  # columns swept at once, and walked at once where a group is larger than SEARCHED
SEARCHED = 128  # the largest group whose scale is chosen on the values that will be coded


def blocks_of(groups: Int[Tensor, " columns"], *, whole: bool) -> list[slice]:
    """Ranges of columns of at most BLOCK values; with ``whole`` one range per group, which the order keeps together."""
    count = len(groups)
    if not whole:
        return [slice(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]
    cuts = [0, *((groups[1:] != groups[:-1]).nonzero().flatten() + 1).tolist(), count]
    return [slice(a, b) for a, b in pairwise(cuts)]


def pulled(
    x: Float[Tensor, "rows columns"],
    errors: Float[Tensor, "rows columns"],
    root: Float[Tensor, "columns columns"],
    block: slice,
) -> Float[Tensor, "rows size"]:
    """X_b + e_d L_db L_bb^-1: what ``block`` would take if it were continuous, d being all columns after it."""
    pull = errors[:, block.stop :] @ root[block.stop :, block]
    moved: Tensor = torch.linalg.solve_triangular(root[block, block], pull, upper=False, left=False)
    return x[:, block] + moved
