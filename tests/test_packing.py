"""Budgets and qualities: true bits within 2 % down to 0.2, the smallest size under an error, every method a file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitloft.adapters import read_adapter, read_packed
from bitloft.compress import compress, expand
from bitloft.errors import OptionError
from bitloft.kernels.ops import decode
from bitloft.options import CompressOptions
from bitloft.packing import Packing, payload_bytes
from bitloft.solvers import baselines
from bitloft.solvers.adapter import Trained
from tests.helpers import shared
from tests.test_compress import large_adapter


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_adapter(tmp_path_factory.mktemp("plain") / "a")


@pytest.mark.parametrize("bits", [0.2, 0.3, 0.5, 0.8, 1.85, 2.8])
def test_a_real_adapter_has_the_bits_asked_for_within_two_percent(bits: float) -> None:
    source = read_adapter(shared("adapters/gpt2-tigrinya-r8"))
    packing = Packing(source, CompressOptions(bits=bits, refine=False))
    modules, notes = packing.solve()
    size = sum(len(data) for data in packing.files(modules).values())
    assert 0.98 * bits < 8 * size / source.values <= bits
    assert not notes


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("quality", [0.5, 0.1, 0.02])
def test_a_quality_is_met_by_the_smallest_size(plain: Path, tmp_path: Path, quality: float, refine: bool) -> None:
    report = compress(plain, tmp_path / "p", quality=quality, refine=refine)
    assert report.error <= quality
    assert read_packed(tmp_path / "p").method["quality"] == quality
    smaller = compress(plain, tmp_path / "s", bits=0.985 * report.true_bits, refine=refine)
    assert smaller.error > quality


def test_a_quality_beyond_four_bits_names_what_is_possible(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no size keeps the error of .* under 1e-06: at 4 bits .* is 0\.0"):
        compress(plain, tmp_path / "p", quality=1e-6)
    assert not (tmp_path / "p").exists()


def test_refinement_pays_and_can_be_left_out(plain: Path, tmp_path: Path) -> None:
    on, off = (compress(plain, tmp_path / str(refine), bits=1.2, refine=refine) for refine in (True, False))
    assert on.error < off.error
    assert (on.method.get("refine"), off.method["refine"]) == (None, False)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"method": "rtn"}, 2),
        ({"method": "rtn", "high": 3}, 3),
        ({"method": "sign"}, 1),
        ({"method": "gptq", "high": 4}, 4),
        ({"method": "truncate", "rank": 2}, 4),
        ({"method": "truncate", "rank": 4, "width": 8}, 4),
        ({"method": "shrink", "quality": 0.1}, 16),
        ({"method": "loraquant", "split": "norm"}, None),
        ({"method": "loraquant", "split": "random", "refine": False}, None),
    ],
)
def test_every_baseline_is_a_file_like_any_other(
    plain: Path, tmp_path: Path, settings: dict[str, Any], bits: int | None
) -> None:
    report = compress(plain, tmp_path / "p", **settings)
    packed = read_packed(tmp_path / "p")
    assert packed.method["name"] == settings["method"]
    assert bits is None or report.payload_bits == pytest.approx(bits)
    expand(tmp_path / "p", tmp_path / "back")
    lost = energy = 0.0
    for before, after in zip(read_adapter(plain).pairs, read_adapter(tmp_path / "back").pairs, strict=True):
        exact = before.scaling * before.b @ before.a
        lost += float((exact - after.scaling * after.b @ after.a).square().sum())
        energy += float(exact.square().sum())
    assert report.error == pytest.approx(lost / energy, rel=1e-3, abs=1e-6)


def test_bytes_of_the_payload_are_those_of_the_file(plain: Path, tmp_path: Path) -> None:
    compress(plain, tmp_path / "p", method="truncate", rank=3)
    packed = read_packed(tmp_path / "p")
    assert payload_bytes(list(packed.modules.values())) == packed.payload.numel()


def moments(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for pair in read_adapter(path).pairs:
        columns = pair.a.shape[1]
        x = torch.randn(300, 40) @ torch.randn(40, columns) + 0.1 * torch.randn(300, columns)
        found[pair.name] = x.T @ x / 300 + 1e-3 * torch.eye(columns)
    return found


def test_input_moments_lower_the_error_where_inputs_are(plain: Path, tmp_path: Path) -> None:
    given = moments(plain)
    blind = compress(plain, tmp_path / "b", bits=0.8)
    aware = compress(plain, tmp_path / "a", bits=0.8, moments=given)
    assert (blind.weighed_error, aware.method["metric"]) == (None, "inputs")
    packed, lost, energy = read_packed(tmp_path / "b"), 0.0, 0.0
    for pair in read_adapter(plain).pairs:
        exact = pair.scaling * pair.b @ pair.a
        delta = sum((decode(b.bt).T @ decode(b.a) for b in packed.modules[pair.name].blocks), torch.zeros_like(exact))
        root = torch.linalg.cholesky(given[pair.name].double()).float()
        lost += float(((exact - delta) @ root).square().sum())
        energy += float((exact @ root).square().sum())
    assert aware.weighed_error is not None
    assert aware.weighed_error < 0.95 * lost / energy  # walks heed the diagonal of S alone
    assert aware.error > blind.error  # what the plain norm pays for it


def test_moments_of_another_width_are_refused(plain: Path, tmp_path: Path) -> None:
    for name, moment, words in (
        ("layers.0.q_proj", torch.eye(8), r"moment of layers.0.q_proj's inputs has shape \(8, 8\); there are 304"),
        ("layers.1.q_proj", -torch.eye(304), "is not positive"),
    ):
        with pytest.raises(OptionError, match=words):
            compress(plain, tmp_path / "p", moments={name: moment})


def test_output_gradients_lower_the_error_in_the_outputs_that_matter(plain: Path, tmp_path: Path) -> None:
    given = {}
    for pair in read_adapter(plain).pairs:
        g = torch.randn(300, 20) @ torch.randn(20, pair.b.shape[0]) + 0.3 * torch.randn(300, pair.b.shape[0])
        given[pair.name] = g.T @ g / 300 + 1e-3 * torch.eye(pair.b.shape[0])
    blind = compress(plain, tmp_path / "b", bits=0.8)
    aware = compress(plain, tmp_path / "a", bits=0.8, gradients=given)
    both = compress(plain, tmp_path / "c", bits=0.8, gradients=given, moments=moments(plain))
    assert (aware.method["metric"], both.method["metric"]) == ("outputs", "inputs+outputs")
    packed, lost, energy = read_packed(tmp_path / "b"), 0.0, 0.0
    for pair in read_adapter(plain).pairs:
        exact = pair.scaling * pair.b @ pair.a
        delta = sum((decode(b.bt).T @ decode(b.a) for b in packed.modules[pair.name].blocks), torch.zeros_like(exact))
        root = torch.linalg.cholesky(given[pair.name].double()).float()
        lost += float((root.T @ (exact - delta)).square().sum())
        energy += float((root.T @ exact).square().sum())
    assert aware.weighed_error is not None
    assert aware.weighed_error < 0.97 * lost / energy
    assert aware.error > blind.error
    with pytest.raises(OptionError, match=r"q_proj's outputs has shape \(8, 8\)"):
        compress(plain, tmp_path / "p", gradients={"layers.0.q_proj": torch.eye(8)})


def test_gptq_takes_the_moments(plain: Path, tmp_path: Path) -> None:
    given = moments(plain)
    pair = read_adapter(plain).pairs[0]
    compress(plain, tmp_path / "p", method="gptq", high=3, moments=given)
    stored = read_packed(tmp_path / "p").modules[pair.name].blocks[0]
    trained = Trained(pair.a, (pair.scaling * pair.b).T.contiguous())
    assert not torch.equal(decode(stored.a), decode(baselines.rtn(trained, 3)[0].a))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1.0, "quality": 0.1}, "two ways to choose a size"),
        ({"quality": 1.0}, r"quality is 1\.0; use an error from 0 to 1"),
        ({"method": "shrink"}, "shrink needs quality"),
        ({"method": "rtn", "high": 5}, "high is 5; use 2, 3 or 4"),
        ({"method": "sign", "high": 2}, "high does not apply to method sign"),
        ({"method": "truncate", "width": 4}, "width is 4; use 16 or 8"),
        ({"method": "truncate", "rank": 0}, "rank is 0; use a positive number"),
        ({"method": "loraquant", "split": "size"}, "unknown split 'size'; use one of svd, norm, random"),
        ({"rank": 2}, "rank does not apply to method waterfill"),
    ],
)
def test_options_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        CompressOptions(**settings)
