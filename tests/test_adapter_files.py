"""Packed adapter directories: bytes in, the same numbers out; views, sums and sizes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bitloft.adapter_files import (
    CONFIG_FILE,
    PACKED_FILE,
    ModuleViews,
    PackedModule,
    canonical,
    is_packed,
    read_packed,
    serialize,
)
from bitloft.errors import CheckpointError
from bitloft.kernels.ops import decode, encode
from bitloft.solvers.adapter import PackedBlock

CONFIG = {"peft_type": "LORA", "r": 4, "target_modules": ["q"]}


def record(values: int, **changes: Any) -> dict[str, Any]:
    return {"base": "b" * 64, "source": None, "start": "frozen", "method": {"name": "test"}, "values": values,
            "error": 0.25} | changes  # fmt: skip


def made(name: str, columns: int, rows: int, formats: list[tuple[str, str, int]], rank: int = 4) -> PackedModule:
    blocks = tuple(
        PackedBlock(encode(torch.randn(k, columns) * 3, a), encode(torch.randn(k, rows), bt)) for a, bt, k in formats
    )
    return PackedModule(name, columns, rows, blocks, rank, 0.125)


def values_of(modules: list[PackedModule]) -> int:
    return sum(m.rank * (m.in_features + m.out_features) for m in modules)


def write(directory: Path, modules: list[PackedModule], **changes: Any) -> Path:
    directory.mkdir(parents=True)
    for name, data in serialize(CONFIG, modules, record(values_of(modules), **changes)).items():
        (directory / name).write_bytes(data)
    return directory


FORMATS = st.tuples(
    st.sampled_from(["lm2:row", "sign:row", "uniform3:128", "lm4:64", "sign:128", "trellis3:row"]),
    st.sampled_from(["lm2:unit", "sign:unit", "uniform2:128", "lm3:row", "trellis2:unit"]),
    st.integers(1, 5),
)
SHAPES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 140), st.lists(FORMATS, max_size=3)), min_size=1, max_size=3
)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_round_trip_of_any_mix(tmp_path_factory: pytest.TempPathFactory, shapes: list[Any]) -> None:
    modules = [made(f"m.{i}", columns, rows, formats) for i, (columns, rows, formats) in enumerate(shapes)]
    found = read_packed(write(tmp_path_factory.mktemp("round") / "p", modules))
    assert list(found.modules) == [m.name for m in modules]
    for module in modules:
        again = found.modules[module.name]
        assert (again.in_features, again.out_features, again.rank, again.error) == (
            module.in_features, module.out_features, 4, 0.125,
        )  # fmt: skip
        for block, stored in zip(module.blocks, again.blocks, strict=True):
            assert torch.equal(decode(block.a), decode(stored.a))
            assert torch.equal(decode(block.bt), decode(stored.bt))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    modules = [
        made("model.layers.0.q", 64, 32, [("sign:row", "sign:unit", 3), ("lm3:row", "lm3:unit", 1)]),
        made("model.layers.0.k", 64, 96, []),
    ]
    return write(tmp_path / "p", modules)


def test_what_a_directory_says(packed: Path) -> None:
    found = read_packed(packed)
    assert is_packed(packed)
    assert not is_packed(packed.parent)
    assert found.config == CONFIG
    assert (found.base, found.source, found.start, found.error) == ("b" * 64, None, "frozen", 0.25)
    assert found.values == 4 * (64 + 32 + 64 + 96)
    size = sum(file.stat().st_size for file in packed.iterdir())
    assert found.true_bits == 8 * size / found.values
    assert found.payload_bits == (3 * 1 + 1 * 3) * (64 + 32) / found.values
    assert found.sha256 == hashlib.sha256((packed / "manifest.json").read_bytes()).hexdigest()


def test_the_weight_file_holds_two_byte_vectors_under_its_own_name(packed: Path) -> None:
    assert sorted(file.name for file in packed.iterdir()) == [CONFIG_FILE, PACKED_FILE, "manifest.json"]
    tensors = load_file(packed / PACKED_FILE)
    assert {name: (t.dtype, t.ndim) for name, t in tensors.items()} == {
        "payload": (torch.uint8, 1),
        "table": (torch.uint8, 1),
    }


def test_modules_are_views_of_one_buffer(packed: Path) -> None:
    found = read_packed(packed)
    start, end = found.payload.data_ptr(), found.payload.data_ptr() + found.payload.numel()
    parts = [t for m in found.modules.values() for b in m.blocks for p in (b.a, b.bt) for t in (p.codes, p.scales)]
    assert sum(t.numel() * t.element_size() for t in parts) == found.payload.numel()
    assert all(start <= t.data_ptr() <= end for t in parts if t.numel())


def test_views_are_made_on_first_use_and_can_be_dropped(packed: Path) -> None:
    views = read_packed(packed).modules
    assert isinstance(views, ModuleViews)
    first = views["model.layers.0.q"]
    assert views["model.layers.0.q"] is first
    views.release()
    again = views["model.layers.0.q"]
    assert again is not first
    assert torch.equal(again.blocks[0].a.codes, first.blocks[0].a.codes)


def test_equal_input_gives_equal_bytes() -> None:
    modules = [made("m.q", 64, 32, [("lm2:row", "lm2:unit", 2)])]
    assert serialize(CONFIG, modules, record(1)) == serialize(dict(reversed(CONFIG.items())), modules, record(1))


def rewrite(directory: Path, **changes: Any) -> None:
    """Change the manifest and give it a sum that fits, as someone with intent could."""
    file = directory / "manifest.json"
    manifest = {k: v for k, v in json.loads(file.read_text()).items() if k != "self"} | changes
    manifest = {k: v for k, v in manifest.items() if v is not ...}
    file.write_bytes(canonical(manifest | {"self": hashlib.sha256(canonical(manifest)).hexdigest()}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "base"}, "kind 'base', schema 1; this version reads 'adapter', 1"),
        ({"schema": 2}, "schema 2; this version reads"),
        ({"values": 5}, "counts 5 values"),
        ({"values": ...}, "lacks one of"),
        ({"base": 5}, "gives it another type"),
        ({"files": {}}, "must list adapter_config.json and"),
        ({"files": {CONFIG_FILE: {}, "../x": {}}}, "must list adapter_config.json and"),
        ({"files": {CONFIG_FILE: {}, PACKED_FILE: {}}}, "differs from its manifest"),
    ],
)
def test_a_manifest_that_lies_is_refused(packed: Path, changes: dict[str, Any], words: str) -> None:
    rewrite(packed, **changes)
    with pytest.raises(CheckpointError, match=words):
        read_packed(packed)


def test_a_table_and_payload_that_do_not_fit_are_refused(packed: Path) -> None:
    from safetensors.torch import save

    tensors = {name: t.clone() for name, t in load_file(packed / PACKED_FILE).items()}
    for changed, words in (
        (tensors | {"payload": tensors["payload"][:-1].clone()}, "its module table needs"),
        (tensors | {"payload": tensors["payload"].to(torch.int32)}, "two byte vectors"),
        ({"payload": tensors["payload"]}, "two byte vectors"),
        (tensors | {"extra": tensors["payload"]}, "two byte vectors"),
        (tensors | {"payload": torch.full_like(tensors["payload"], 255)}, "a scale that is NaN or infinite"),
    ):
        data = save({name: t.clone() for name, t in changed.items()})
        (packed / PACKED_FILE).write_bytes(data)
        sums = json.loads((packed / "manifest.json").read_text())["files"]
        sums[PACKED_FILE] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        rewrite(packed, files=sums)
        with pytest.raises(CheckpointError, match=words):
            read_packed(packed)


def test_half_precision_codes_behind_odd_bytes_are_read_and_checked(tmp_path: Path) -> None:
    """The codes of the first module end at an odd byte; an infinite half among the second's codes is refused."""
    from safetensors.torch import save

    odd = [made("m.a", 8, 16, [("sign:row", "sign:unit", 1)]), made("m.b", 9, 7, [("half:row", "half:unit", 2)])]
    directory = write(tmp_path / "p", odd)
    stored = read_packed(directory).modules["m.b"].blocks[0]
    for found, exact in ((stored.a, odd[1].blocks[0].a), (stored.bt, odd[1].blocks[0].bt)):
        assert torch.equal(decode(found), decode(exact))
    tensors = {name: t.clone() for name, t in load_file(directory / PACKED_FILE).items()}
    tensors["payload"][-2:] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    data = save(tensors)
    (directory / PACKED_FILE).write_bytes(data)
    sums = json.loads((directory / "manifest.json").read_text())["files"]
    sums[PACKED_FILE] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(directory, files=sums)
    with pytest.raises(CheckpointError, match="a value that is NaN or infinite"):
        read_packed(directory)


@pytest.mark.parametrize("name", [CONFIG_FILE, PACKED_FILE, "manifest.json"])
def test_a_missing_file_is_named(packed: Path, name: str) -> None:
    (packed / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        read_packed(packed)


def test_a_manifest_that_is_no_object_is_refused(packed: Path) -> None:
    (packed / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_packed(packed)
    (packed / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        read_packed(packed)
