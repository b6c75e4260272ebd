"""QLoRA's start is plain rounding."""

import pytest
import torch

from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.solvers.qlora import qlora


def test_codes_are_those_of_encode_and_no_start_is_kept() -> None:
    weight = torch.randn(32, 96)
    found = qlora(weight, Format.parse("nf4:64"))
    assert torch.equal(found.weight.codes, encode(weight, "nf4:64").codes)
    assert found.start is None
    error = torch.linalg.vector_norm(weight - decode(found.weight)) / torch.linalg.vector_norm(weight)
    assert found.error_after == pytest.approx(float(error), rel=1e-6)
