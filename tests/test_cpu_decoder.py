"""What the native step refuses: wrong sizes are sentences, never crashes. That it is right: tests/test_decoder.py."""

import pytest
import torch
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.cpu_decoder import SLOTS, NativeDecoder, NativeLayer, Projection
from bitloft.kernels.ops import encode

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"needs the native library: {cpu.explain()}")
WIDTH, INNER, HEADS = 32, 48, (2, 1, 16)


def projection(name: str, rows: int, columns: int) -> Projection:
    return Projection(name, encode(torch.randn(rows, columns), "lm2:64"), None, None, 0.0)


def layer(inner: int = INNER, queries: int = 32) -> NativeLayer:
    return NativeLayer(
        torch.ones(WIDTH),
        torch.ones(WIDTH),
        attention=[projection("q", queries, WIDTH), projection("k", 16, WIDTH), projection("v", 16, WIDTH)],
        output=[projection("o", WIDTH, 32)],
        gates=[projection("gate", INNER, WIDTH), projection("up", inner, WIDTH)],
        down=[projection("down", WIDTH, INNER)],
    )


def made(one: NativeLayer) -> NativeDecoder:
    decoder = NativeDecoder([one], norm=torch.ones(WIDTH), heads=HEADS, eps=1e-5, scale=0.25)
    decoder.rotate(torch.ones(100, 16), torch.zeros(100, 16))
    return decoder


def cache(length: int, slots: int = SLOTS) -> tuple[Tensor, Tensor, int]:
    return torch.zeros(1, 1, 16, slots), torch.zeros(1, 1, slots, 16), length


def test_the_first_token_attends_to_itself() -> None:
    """With one token attention is its value, whatever the angles."""
    one = layer()
    hidden = torch.randn(1, WIDTH)
    found = hidden.clone()
    decoder = made(one)
    decoder.step(found, [cache(0)], decoder.plan(1))

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def times(x: Tensor, p: Projection) -> Tensor:
        from bitloft.kernels.plain import packed_linear

        return packed_linear(x, p.weight)

    value = times(norm(hidden), one.attention[2])
    x = hidden + times(torch.cat([value, value], 1), one.output[0])
    gate, up = (times(norm(x), p) for p in one.gates)
    x = x + times(torch.nn.functional.silu(gate) * up, one.down[0])
    torch.testing.assert_close(found, norm(x), rtol=1e-5, atol=1e-5)


def test_wrong_sizes_are_sentences() -> None:
    decoder = made(layer())
    plan = decoder.plan(1)
    with pytest.raises(KernelError, match="row 0 has 64 tokens in a cache of 64"):
        decoder.step(torch.zeros(1, WIDTH), [cache(SLOTS)], plan)
    with pytest.raises(KernelError, match="row 0 has 100 tokens in a cache of 128, and 100 positions are known"):
        decoder.step(torch.zeros(1, WIDTH), [cache(100, 128)], plan)
    with pytest.raises(KernelError, match="in a cache of 65"):
        decoder.step(torch.zeros(1, WIDTH), [cache(0, 65)], plan)
    with pytest.raises(KernelError, match="takes 1 contiguous float32 rows"):
        decoder.step(torch.zeros(2, WIDTH), [cache(0), cache(0)], plan)
    with pytest.raises(KernelError, match="takes 1 contiguous float32 rows"):
        decoder.step(torch.zeros(1, WIDTH, dtype=torch.bfloat16), [cache(0)], plan)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"inner": 64}, "matrix 1 of a layer's gates is 64 x 32 where 48 x 32 is needed"),
        ({"queries": 48}, "matrix 0 of a layer's attention is 48 x 32 where 32 x 32 is needed"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(wrong: dict[str, int], sentence: str) -> None:
    decoder = made(layer(**wrong))
    with pytest.raises(KernelError, match=sentence):
        decoder.step(torch.zeros(1, WIDTH), [cache(0)], decoder.plan(1))


def test_more_attention_than_threads_start_for() -> None:
    """Long texts go to all threads and give the same."""
    decoder, tokens = made(layer()), 99
    states = [torch.randn(1, 1, 16, 128), torch.randn(1, 1, 128, 16)]
    rows = [(states[0].clone(), states[1].clone(), tokens) for _ in range(64)]
    hidden = torch.randn(1, WIDTH).expand(64, WIDTH).contiguous()
    one = hidden[:1].clone()
    decoder.step(hidden, rows, decoder.plan(64))
    decoder.step(one, [(states[0].clone(), states[1].clone(), tokens)], decoder.plan(1))
    torch.testing.assert_close(hidden, one.expand(64, WIDTH), rtol=1e-5, atol=1e-5)
