"""The plain definitions against independent ones: nearest levels by brute force, dense products, bitsandbytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import Format
from bitloft.kernels import encoding, plain
from bitloft.kernels.plain import decode, encode, packed_linear, packed_linear_grad_input
from bitloft.packed import unpack_bits, unpack_scales
from tests.test_formats import FORMATS

# squared error on unit Gaussian data, group 64 (sign: 128), from the table of the design's research
GAUSS = {"nf4:64": 0.0085, "nf3:64": 0.0406, "nf2:64": 0.3165, "lm2:64": 0.1112, "lm3:64": 0.0293, "lm4:64": 0.0069}


def brute_force(x: Tensor, fmt: Format, scales: Tensor) -> Tensor:
    """Nearest level by comparing with every one."""
    levels = torch.tensor(fmt.levels)
    grouped = x.reshape(-1, 1) - levels * scales.repeat_interleave(fmt.group, dim=1).reshape(-1, 1)
    return grouped.abs().argmin(1).reshape(x.shape)


@pytest.mark.parametrize("spelling", ["nf4:64", "nf3:64", "nf2:64", "lm2:64", "lm3:64", "lm4:64"])
def test_codes_are_the_nearest_levels(spelling: str) -> None:
    x = torch.randn(8, 128)
    packed = encode(x, spelling)
    codes = unpack_bits(packed.codes, packed.format.bits, 128)
    scales = x.reshape(8, 2, 64).abs().amax(2) if spelling.startswith("nf") else None
    if scales is None:
        scales = unpack_scales(packed.scales, packed.exponent)  # rounded to fp16: ties may fall the other way
    expected = brute_force(x, packed.format, scales)
    assert (codes.int() != expected).float().mean() < 0.002


@pytest.mark.parametrize(("spelling", "expected"), GAUSS.items())
def test_error_on_gaussian_data_is_the_published_one(spelling: str, expected: float) -> None:
    x = torch.randn(512, 1024)
    error = (decode(encode(x, spelling)) - x).square().mean().item()
    assert error == pytest.approx(expected, rel=0.04)


def test_one_range_per_tensor_is_loftqs_glue_quantizer() -> None:
    """Clip to mean +- 2 standard deviations, then even levels between the ends (R-LoftQ glue code, restated)."""
    x = torch.randn(200, 300) * 0.3 + 0.1
    low, high = x.mean() - 2 * x.std(correction=0), x.mean() + 2 * x.std(correction=0)
    expected = low + (high - low) / 3 * ((x.clamp(low, high) - low) / (high - low) * 3).round()
    found = decode(encode(x, "uniform2:tensor"))
    assert (found - expected).abs().gt(1e-3).float().mean() < 2e-3  # fp16 ends move a few values over a boundary
    gauss = torch.randn(512, 1024)
    assert (decode(encode(gauss, "uniform2:tensor")) - gauss).square().mean().item() == pytest.approx(0.1545, rel=0.02)


def test_learned_levels_beat_fixed_ones_on_heavy_tails_and_lose_nothing_on_gauss() -> None:
    gauss = torch.randn(256, 1024)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((256, 1024))

    def error(x: Tensor, spelling: str) -> float:
        return float((decode(encode(x, spelling)) - x).square().sum() / x.square().sum())

    assert error(laplace, "book2:64") < 0.99 * error(laplace, "lm2:64")
    assert error(gauss, "book2:64") < 1.01 * error(gauss, "lm2:64")
    assert error(gauss, "book3:64") < 1.01 * error(gauss, "lm3:64")


def test_wide_formats_round_finely() -> None:
    x = torch.randn(6, 100) * torch.logspace(-3, 6, 6)[:, None]
    norms = x.square().sum(1)
    for spelling, error in (("int8:row", 2e-4), ("int8:64", 1e-4), ("half:row", 1e-7)):
        assert bool(((decode(encode(x, spelling)) - x).square().sum(1) < error * norms).all()), spelling
    assert torch.equal(decode(encode(x[:4], "half:unit")), x[:4].half().float())
    with pytest.raises(KernelError, match="a value is beyond half precision"):
        encode(x, "half:unit")


@pytest.mark.parametrize("plain", ["nf4:64", "lm2:64", "uniform3:64", "book2:64", "sign:64"])
def test_double_quantization_costs_little_error(plain: str) -> None:
    x = torch.randn(256, 512) * torch.rand(256, 1).add(0.5)
    once = (decode(encode(x, plain)) - x).square().sum()
    twice = (decode(encode(x, plain + "+dq")) - x).square().sum()
    assert twice < once * 1.02


def test_shifts_follow_the_groups() -> None:
    """Groups of another center each: with a shift the error is that of centered groups."""
    centers = torch.randn(64, 4, 1).mul(5).expand(-1, -1, 64).reshape(64, 256)
    x = torch.randn(64, 256)
    for unshifted in ("lm2:64", "nf4:64", "sign:64", "book2:64"):
        moved = (decode(encode(x + centers, unshifted + "+shift")) - x - centers).square().mean()
        assert moved < 1.1 * (decode(encode(x, unshifted)) - x).square().mean(), unshifted
        assert moved < 0.5 * (decode(encode(x + centers, unshifted)) - x - centers).square().mean()
    y = decode(encode(x + centers, "uniform4:64+shift"))
    step = (x.view(64, 4, 64).amax(2) - x.view(64, 4, 64).amin(2)) / 15
    assert bool(((y - x - centers).view(64, 4, 64).abs().amax(2) <= step * 0.52 + 0.02).all())


def test_two_bit_scale_is_optimal() -> None:
    """No scale on a fine grid beats the one found from the sorted magnitudes."""
    x = torch.randn(64, 64) * torch.rand(64, 1)
    levels = torch.tensor(Format.parse("lm2:64").levels)
    best = torch.full((64,), float("inf"))
    for factor in torch.linspace(0.02, 1.5, 600):
        scale = x.abs().amax(1, keepdim=True) * factor
        nearest = levels[(x.unsqueeze(-1) - scale.unsqueeze(-1) * levels).abs().argmin(-1)] * scale
        best = torch.minimum(best, (nearest - x).square().sum(1))
    found = (decode(encode(x, "lm2:64")) - x).square().sum(1)
    assert bool((found <= best * 1.002).all())


def test_sign_scale_is_the_mean_of_magnitudes() -> None:
    x = torch.randn(3, 200)
    expected = torch.cat([h.sign() * h.abs().mean(1, keepdim=True) for h in x.split(128, dim=1)], dim=1)
    torch.testing.assert_close(decode(encode(x, "sign:128")), expected, rtol=1e-3, atol=1e-4)


def test_uniform_keeps_zero_and_covers_the_range() -> None:
    x = torch.randn(4, 64)
    x[:, 5] = 0
    y = decode(encode(x, "uniform4:64"))
    assert bool((y[:, 5] == 0).all())
    step = (x.amax(1) - x.amin(1)) / 15
    assert bool(((x - y).abs().amax(1) <= step * 1.01).all())


def test_constant_and_zero_groups() -> None:
    x = torch.zeros(2, 64)
    for spelling in FORMATS:
        if not spelling.endswith("unit"):
            y = decode(encode(x, spelling))
            assert torch.equal(y, x), spelling
    torch.testing.assert_close(decode(encode(x + 3, "nf4:64")), x + 3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 5), st.sampled_from([1, 7, 8, 63, 65, 127, 130]), st.integers(0, 2**31))
def test_padding_does_not_change_values(spelling: str, rows: int, columns: int, seed: int) -> None:
    """A ragged width decodes as each group encoded alone does: the padding has no influence on a scale."""
    fmt = Format.parse(spelling)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    y = decode(encode(x, fmt))
    assert y.shape == x.shape
    if fmt.has_levels or fmt.dq or fmt.group < 0:  # these share something across groups
        return
    step = fmt.group_size(columns)
    for start in range(0, columns, step):
        alone = decode(encode(x[:, start : start + step], fmt))
        torch.testing.assert_close(y[:, start : start + step], alone, rtol=2e-3, atol=1e-6)


def test_nf4_codes_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed in range(5):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)
        packed, _ = functional.quantize_4bit(x, quant_type="nf4", blocksize=64)
        flat = packed.flatten()
        theirs = torch.stack([flat >> 4, flat & 15], dim=1).reshape(x.shape)  # their first code is in the high half
        assert torch.equal(unpack_bits(encode(x, "nf4:64").codes, 4, 256), theirs)


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (127, 576), (65, 130)])
def test_packed_linear_is_the_dense_product(spelling: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = encode(torch.randn(rows, columns), spelling)
    dense = decode(weight, dtype)
    for batch in [(0, columns), (3, columns), (2, 5, columns)]:
        x = torch.randn(batch, dtype=dtype)
        torch.testing.assert_close(packed_linear(x, weight), x @ dense.T)
        grad = torch.randn(*batch[:-1], rows, dtype=dtype)
        torch.testing.assert_close(packed_linear_grad_input(grad, weight), grad @ dense)


def test_tiles_are_bounded_and_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile exceeds TILE values, and several tiles give what one gives."""
    weight = encode(torch.randn(100, 70), "lm3:64")
    x, grad = torch.randn(3, 70).T.contiguous().T, torch.randn(3, 100)
    whole = packed_linear(x, weight), packed_linear_grad_input(grad, weight)
    monkeypatch.setattr(plain, "TILE", 128 * 7)
    sizes = [tile.numel() for _, tile in plain.tiles(weight, torch.float32)]
    assert len(sizes) == 15
    assert max(sizes) <= 128 * 7
    torch.testing.assert_close(packed_linear(x, weight), whole[0])
    torch.testing.assert_close(packed_linear_grad_input(grad, weight), whole[1])


def test_wrong_widths_are_refused() -> None:
    weight = encode(torch.randn(8, 64), "lm2:64")
    with pytest.raises(KernelError, match=r"32 columns.*needs 64"):
        packed_linear(torch.randn(2, 32), weight)
    with pytest.raises(KernelError, match="needs 8"):
        packed_linear_grad_input(torch.randn(2, 64), weight)
    with pytest.raises(KernelError, match="takes a matrix"):
        packed_linear(torch.randn(2, 64), encode(torch.randn(2, 8, 64), "lm2:64"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_encoded(bad: float) -> None:
    x = torch.randn(2, 64)
    x[1, 3] = bad
    with pytest.raises(KernelError, match="NaN or infinity"):
        encode(x, "lm2:64")


def test_encoding_does_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 130)
    for spelling in FORMATS:
        monkeypatch.setattr(encoding, "TILE", 1 << 20)
        whole = encode(x, spelling)
        monkeypatch.setattr(encoding, "TILE", 600)
        parts = encode(x, spelling).tensors()
        assert all(torch.equal(part, parts[name]) for name, part in whole.tensors().items()), spelling


@pytest.mark.parametrize("spelling", [*FORMATS, "nf4:64+dq", "lm2:64+shift", "uniform2:tensor", "book3:64"])
def test_columns_by_number_are_those_of_the_whole(spelling: str) -> None:
    packed = encode(torch.randn(9, 100), spelling)
    columns = torch.tensor([99, 0, 0, 63, 64, 5])
    assert torch.equal(plain.decode_columns(packed, columns), decode(packed)[:, columns])
    assert torch.equal(plain.decode_columns(packed, torch.arange(100)), decode(packed))
    assert plain.decode_columns(packed, columns[:0]).shape == (9, 0)
    assert plain.decode_columns(packed, columns, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(KernelError, match="decode_columns takes a matrix"):
        plain.decode_columns(encode(torch.randn(2, 3, 64), spelling), columns)


@pytest.mark.parametrize("spelling", [*FORMATS, "nf4:64+dq", "lm2:64+shift", "uniform2:tensor", "book3:64"])
def test_rows_by_number_are_those_of_the_whole(spelling: str) -> None:
    packed = encode(torch.randn(9, 100), spelling)
    rows = torch.tensor([8, 0, 0, 5])
    assert torch.equal(plain.decode_rows(packed, rows), decode(packed)[rows])
    assert plain.decode_rows(packed, rows[:0]).shape == (0, 100)
    for wrong in (-1, 9):
        with pytest.raises(IndexError):
            plain.decode_rows(packed, torch.tensor([0, wrong]))
    assert plain.decode_rows(packed, rows, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(KernelError, match="decode_rows takes a matrix"):
        plain.decode_rows(encode(torch.randn(2, 3, 64), spelling), rows)
