"""Squared error of every number format beside its peers, at true bits, on samples and on real weights.

error = |x - q(x)|^2 / |x|^2. Samples: Gaussian, Student t with 5 degrees of freedom, Laplace (rows of 1024 values).
Real: every linear of SmolLM2 and MiniLM (summed over the model), where --smollm2 and --minilm (or BITLOFT_SMOLLM2 and
BITLOFT_MINILM) name their folders.

Peers: bitsandbytes NF4 and FP4, plain and with double quantization, by the installed package; HQQ (half-quadratic zero
points, Badri and Shaji 2023) and round-to-nearest on a min-max grid (fp16 scale and zero point), both written here;
LoftQ's released NF2/NF3 with fp32 scales. A peer is beaten where some format of ours has no larger error at no more
true bits (to 0.1 %); those that are not are listed in ``worse_than_peer``.

Floor: the Shannon lower bound of the distribution at R true bits, N * 2^(-2R) with N its entropy power (Gaussian: 1);
real weights have none that is known.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import torch
from torch import Tensor

from bitloft.checkpoint import read_tensors, weight_files
from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode

FORMATS = (
    "nf2:64", "nf2:64+dq", "nf3:64", "nf4:32", "nf4:32+dq", "nf4:64", "nf4:64+dq",
    "lm2:32", "lm2:64", "lm2:64+dq", "lm2:128", "lm2:64+shift", "lm3:32", "lm3:64", "lm3:64+dq",
    "lm4:32", "lm4:64", "lm4:64+dq", "lm4:64+shift", "book2:64", "book2:64+dq", "book3:64", "book3:64+dq",
    "uniform2:64", "uniform3:64", "uniform4:64", "uniform2:tensor", "uniform3:tensor", "uniform4:tensor", "sign:64",
)  # fmt: skip
QUICK = (
    "nf2:64",
    "nf4:64",
    "nf4:32",
    "nf4:64+dq",
    "lm2:32",
    "lm2:64",
    "lm3:32",
    "lm3:64",
    "lm4:32",
    "lm4:64",
    "lm4:64+dq",
)
ROWS = {"smoke": 32, "quick": 512, "full": 4096}
TOLERANCE = 1.001

Peer = Callable[[Tensor], tuple[Tensor, float]]  # x [rows, columns] -> values, true bits per value


def main() -> int:
    arguments = _parser().parse_args()
    harness.begin(arguments)
    formats = FORMATS if arguments.mode == "full" else QUICK
    errors: dict[str, dict[str, list[float]]] = {}
    for name, matrices in _data(arguments):
        errors[name] = {spelling: _sum(matrices(), _ours(spelling)) for spelling in formats}
        errors[name] |= {peer: _sum(matrices(), run) for peer, run in _peers().items()}
        _print(name, errors[name])
    worse = _worse(errors, set(formats))
    print(
        "worse than a peer at equal true bits: " + (", ".join(f"{w['peer']} on {w['data']}" for w in worse) or "none")
    )
    figures = {
        "lm2_gauss": round(errors["gauss"]["lm2:64"][0], 5),
        "worse_than_peer": worse,
        "errors": {
            name: {k: [round(e, 6), round(b, 4)] for k, (e, b) in found.items()} for name, found in errors.items()
        },
        "floor": {name: {k: _bound(name, bits) for k, (_, bits) in found.items()} for name, found in errors.items()},
    }
    harness.finish("quantizers", arguments, {"rows": ROWS[arguments.mode], "columns": 1024}, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    for name in ("smollm2", "minilm"):
        default = os.environ.get(f"BITLOFT_{name.upper()}")
        parser.add_argument(
            f"--{name}", type=Path, default=default, help=f"model folder (default: BITLOFT_{name.upper()})"
        )
    return parser


def _data(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Iterator[Tensor]]]]:
    """Name and a source of matrices, read anew for each format."""
    for name, draw in (("gauss", _gauss), ("student5", _student), ("laplace", _laplace)):
        x = draw((ROWS[arguments.mode], 1024), torch.Generator().manual_seed(0))
        yield name, lambda x=x: iter([x])  # type: ignore[misc]
    for name in ("smollm2", "minilm"):
        folder = getattr(arguments, name)
        if folder is None or arguments.mode == "smoke":
            print(f"{name}: not measured ({'toy sizes' if arguments.mode == 'smoke' else f'no --{name} given'})")
        else:
            yield name, lambda folder=Path(folder): _linears(folder, arguments.mode)  # type: ignore[misc]


def _gauss(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _student(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Student t, 5 degrees of freedom, unit variance."""
    chi = sum(torch.randn(shape, generator=generator).square() for _ in range(5))
    return torch.randn(shape, generator=generator) / (torch.as_tensor(chi) / 5).sqrt() / math.sqrt(5 / 3)


def _laplace(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)


def _linears(folder: Path, mode: str) -> Iterator[Tensor]:
    """The two-dimensional weights of the layers; every tenth with --quick."""
    found = 0
    for file in weight_files(folder):
        for name, tensor in sorted(read_tensors(file).items()):
            if tensor.ndim == 2 and "embed" not in name and "pooler" not in name and "head" not in name:
                found += 1
                if mode == "full" or found % 10 == 1:
                    yield tensor.float()


def _sum(matrices: Iterator[Tensor], quantize: Peer) -> list[float]:
    """Relative squared error and true bits per value over all matrices."""
    lost = energy = bits = 0.0
    count = 0
    for x in matrices:
        values, each = quantize(x)
        lost += float((x - values).double().square().sum())
        energy += float(x.double().square().sum())
        bits, count = bits + each * x.numel(), count + x.numel()
    return [lost / energy, bits / count]


def _ours(spelling: str) -> Peer:
    def run(x: Tensor) -> tuple[Tensor, float]:
        packed = encode(x, Format.parse(spelling))
        return decode(packed), packed.true_bits

    return run


def _peers() -> dict[str, Peer]:
    made: dict[str, Peer] = {}
    for bits in (2, 3, 4):
        made[f"HQQ {bits} bits g64"] = lambda x, bits=bits: hqq(x, bits)  # type: ignore[misc]
        made[f"RTN {bits} bits g64"] = lambda x, bits=bits: round_to_nearest(x, bits)  # type: ignore[misc]
    for bits in (2, 3):
        made[f"LoftQ NF{bits} g64 fp32 scales"] = lambda x, bits=bits: _loftq_nf(x, bits)  # type: ignore[misc]
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError:
        print("bitsandbytes: not installed, not measured")
        return made
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            name = f"bitsandbytes {kind.upper()}{' double' if nested else ''}"
            made[name] = lambda x, kind=kind, nested=nested: _bitsandbytes(x, kind, nested)  # type: ignore[misc]
    return made


def _bitsandbytes(x: Tensor, kind: str, nested: bool) -> tuple[Tensor, float]:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=nested)
    size = codes.numel() + state.absmax.numel() * state.absmax.element_size()
    if nested:
        size += state.state2.absmax.numel() * 4 + 4  # and the offset
    return functional.dequantize_4bit(codes, state), 8 * size / x.numel()


def _loftq_nf(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """LoftQ's released code: absmax of 64 values in fp32, nearest NormalFloat level."""
    levels = torch.tensor(Format("nf", bits, 64).levels)
    groups = x.reshape(-1, 64)
    absmax = groups.abs().amax(1, keepdim=True)
    codes = torch.bucketize(groups / absmax, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * absmax).reshape(x.shape), bits + 32 / 64


def _grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of 64 with the inverse step and the zero point of a min-max grid."""
    groups = x.reshape(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    inverse = (2**bits - 1) / (high - low).clamp_min(1e-12)
    return groups, inverse, -low * inverse


def round_to_nearest(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """Min-max grid, scale and zero point in fp16."""
    groups, inverse, zero = _grid(x, bits)
    step, zero = (1 / inverse).half().float(), zero.half().float()
    codes = torch.round(groups / step + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * step).reshape(x.shape), bits + 32 / 64


def hqq(x: Tensor, bits: int, rounds: int = 20, beta: float = 10.0, p: float = 0.7) -> tuple[Tensor, float]:
    """Half-quadratic quantization: the zero point that minimizes sum |w - q(w)|^p, scale from min and max.

    Alternates a shrinkage of the error, e = sign(d) * max(|d| - |d|^(p-1) / beta, 0), and z = mean(q - (w - e) / s),
    beta growing by 1 % a round; stops when the mean error no longer falls. Scale and zero point in fp16.
    """
    groups, inverse, zero = _grid(x, bits)
    best, best_error = zero, float("inf")
    for _ in range(rounds):
        codes = torch.round(groups * inverse + zero).clamp(0, 2**bits - 1)
        error = groups - (codes - zero) / inverse
        mean = float(error.abs().mean())
        if mean >= best_error:
            break
        best, best_error = zero, mean
        size = error.abs()
        shrunk = error.sign() * (size - size.clamp_min(1e-12).pow(p - 1) / beta).clamp_min(0)
        zero = (codes - (groups - shrunk) * inverse).mean(1, keepdim=True)
        beta *= 1.01
    step, zero = (1 / inverse).half().float(), best.half().float()
    codes = torch.round(groups / step + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * step).reshape(x.shape), bits + 32 / 64


def _worse(errors: dict[str, dict[str, list[float]]], own: set[str]) -> list[dict[str, object]]:
    """Peers that no format of ours matches at their true bits or fewer."""
    found: list[dict[str, object]] = []
    for data, by_name in errors.items():
        for peer in by_name.keys() - own:
            error, bits = by_name[peer]
            fitting = {k: e for k, (e, b) in by_name.items() if k in own and b <= bits * TOLERANCE}
            best = min(fitting, key=lambda k: fitting[k], default=None)
            if best is None or fitting[best] > error * TOLERANCE:
                found.append({"data": data, "peer": peer, "bits": bits, "error": error, "ours": best})
    return sorted(found, key=str)


def _bound(data: str, bits: float) -> float | None:
    """Shannon lower bound on the relative squared error; None where the distribution is not known."""
    power = {"gauss": 1.0, "laplace": math.e / math.pi, "student5": _student_power(5.0)}.get(data)
    return None if power is None else round(power * 2 ** (-2 * bits), 6)


def _student_power(nu: float) -> float:
    """Entropy power of a Student t of unit variance: e^(2h) / (2 pi e), its differential entropy h in closed form."""
    psi = torch.digamma(torch.tensor([(nu + 1) / 2, nu / 2], dtype=torch.float64))
    beta = math.lgamma(nu / 2) + math.lgamma(0.5) - math.lgamma((nu + 1) / 2)
    h = (nu + 1) / 2 * float(psi[0] - psi[1]) + 0.5 * math.log(nu) + beta - 0.5 * math.log(nu / (nu - 2))
    return math.exp(2 * h) / (2 * math.pi * math.e)


def _print(name: str, found: dict[str, list[float]]) -> None:
    print(f"\n{name}: relative squared error")
    ordered = sorted(found.items(), key=lambda item: (item[1][1], item[1][0]))
    harness.table(
        ("true bits", "error", "bound", "format"), [(b, e, _bound(name, b) or "-", k) for k, (e, b) in ordered]
    )


if __name__ == "__main__":
    sys.exit(main())
