"""A whole adapter described at once says what its blocks, described one by one, say."""

import ctypes
from pathlib import Path

import pytest
import torch

from bitloft.adapters import PackedAdapter, read_adapter, read_packed
from bitloft.compress import compress
from bitloft.kernels import cpu, cpu_lora
from bitloft.modules.held import Held
from bitloft.options import CompressOptions
from tests.helpers import make_adapter

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"needs the native library: {cpu.explain()}")


@pytest.fixture(scope="module", params=["waterfill 0.9", "waterfill 3.0", "loraquant"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedAdapter:
    root = tmp_path_factory.mktemp("described")
    method, *bits = request.param.split()
    options = CompressOptions(method=method, bits=float(bits[0]) if bits else None)
    compress(make_adapter(root / "plain", rank=8), root / "packed", options)
    return read_packed(root / "packed")


def matrix(found: cpu.Matrix) -> dict[str, object]:
    """A matrix by value: numbers, and the bytes behind every address."""
    values: dict[str, object] = {}
    for name, kind in found._fields_:
        value = getattr(found, name)
        if name in ("codes", "scales", "zeros", "shifts"):
            size = getattr(found, f"{name}_bytes")
            values[name] = ctypes.string_at(value, size) if size else b""
        elif name == "exponent":
            values[name] = ctypes.string_at(value, 4)
        elif name == "levels":
            values[name] = ctypes.string_at(value, 4 << found.bits) if value and found.bits < 16 else b""
        elif kind is not ctypes.c_void_p:
            values[name] = value
    return values


def blocks(count: int, address: int) -> list[tuple[object, ...]]:
    array = ctypes.cast(ctypes.c_void_p(address), ctypes.POINTER(cpu_lora.BlockList._fields_[1][1]._type_))
    found = []
    for block in array[:count]:
        sides = [(f.rows, f.columns, matrix(f.packed.contents)) for f in (block.a, block.bt)]
        found.append((block.scaling, *sides))
    return found


def test_the_same_blocks(packed: PackedAdapter) -> None:
    one, other = Held(packed), Held(packed)
    modules = tuple(packed.modules)
    table = one.described(modules).table
    assert one.described(modules).covers
    views = other.views()
    touched = 0
    for name, (count, address) in zip(modules, table.tolist(), strict=True):
        native = views.native(name)
        if native is None:
            assert count == 0
            continue
        expected = blocks(native.struct.count, ctypes.addressof(native.struct.block.contents))
        assert blocks(count, address) == expected
        touched += count
    assert touched


def test_modules_in_another_order_and_others(packed: PackedAdapter) -> None:
    held = Held(packed)
    names = list(packed.modules)[::-1]
    table = held.described(("somewhere.else", *names)).table
    assert table[0].tolist() == [0, 0]
    again = held.described(tuple(names)).table
    assert torch.equal(table[1:, 0], again[:, 0])


def test_modules_that_were_not_asked_for(packed: PackedAdapter) -> None:
    names = tuple(name for name in packed.modules if "down_proj" not in name)
    assert not Held(packed).described(names).covers


def test_a_plain_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "plain"))
    held = Held(adapter)
    names = tuple(pair.name for pair in adapter.pairs)
    found = held.described(names)
    assert found.covers
    assert found.table[:, 0].tolist() == [1] * len(names)


def test_it_is_kept_until_released(packed: PackedAdapter) -> None:
    held = Held(packed)
    names = tuple(packed.modules)
    first = held.described(names)
    assert held.described(names) is first
    assert first.nbytes > 0
    held.release()
    assert held.described(names) is not first
