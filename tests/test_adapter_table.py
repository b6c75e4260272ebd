"""The module table: round trip, compactness, order of the payload, and every way it can lie."""

import json
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.adapter_table import (
    TABLE_LIMIT,
    BlockSpec,
    ModuleSpec,
    code_bits,
    parts,
    payload_size,
    read_table,
    write_table,
)
from bitloft.errors import CheckpointError
from bitloft.formats import Format

ROW, UNIT = Format.parse("lm2:row"), Format.parse("lm2:unit")
RTN = Format.parse("uniform3:128")


def module(name: str = "m.q", blocks: tuple[BlockSpec, ...] = (BlockSpec(ROW, UNIT, 3, -5, 0),)) -> ModuleSpec:
    return ModuleSpec(name, 33, 20, 4, 120, blocks)


BLOCK = st.tuples(
    st.sampled_from([ROW, RTN, Format.parse("sign:row")]),
    st.sampled_from([UNIT, RTN]),
    st.integers(1, 9),
    st.integers(-40, 40),
    st.integers(-2, 2),
)
MODULE = st.tuples(
    st.text("abc_0", min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(0, 1000),
    st.lists(BLOCK, max_size=3),
)
MODULES = st.lists(MODULE, unique_by=lambda m: m[0], max_size=6)


def built(rows: list[Any]) -> list[ModuleSpec]:
    return [
        ModuleSpec(name, inputs, outputs, rank, error, tuple(BlockSpec(*block) for block in blocks))
        for name, inputs, outputs, rank, error, blocks in rows
    ]


@settings(max_examples=50, deadline=None)
@given(MODULES)
def test_round_trip(rows: list[Any]) -> None:
    modules = built(rows)
    assert read_table(write_table(modules), "x") == tuple(modules)


@settings(max_examples=30, deadline=None)
@given(MODULES)
def test_scales_come_first_and_every_part_is_there(rows: list[Any]) -> None:
    modules = built(rows)
    order = [name for *_, name, _ in parts(modules)]
    assert order == sorted(order, key=lambda name: name != "scales")
    assert len(order) == sum(4 + b.a_format.has_zeros + b.bt_format.has_zeros for m in modules for b in m.blocks)
    assert payload_size(modules) * 8 >= code_bits(modules)


def test_payload_of_one_block() -> None:
    """3 components of 33 and 20 values at 2 bits: rows padded to 40 and 24 codes, one scale each on the A side."""
    assert payload_size([module()]) == 3 * (10 + 6 + 2)
    assert code_bits([module()]) == 3 * 2 * (33 + 20)


def test_a_table_of_a_thirty_layer_model_is_small() -> None:
    names = [
        f"model.layers.{i}.{part}" for i in range(30) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    modules = [module(n, (BlockSpec(ROW, UNIT, 1 + i % 5, -9, 0),)) for i, n in enumerate(names)]
    assert len(write_table(modules)) < 800


def columns(**changes: Any) -> bytes:
    """A table with some columns replaced."""
    table = json.loads(zlib.decompress(write_table([module()])))
    return zlib.compress(json.dumps(table | changes).encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid"),
        (b"junk", "not valid"),
        (write_table([module()])[:-1], "truncated"),
        (write_table([module()]) + b"x", "trailing"),
        (zlib.compress(b"[]"), "wrong columns"),
        (zlib.compress(b"[" * 100_000), "not valid"),
        (zlib.compress(b"{}"), "wrong columns"),
        (zlib.compress(b" " * (TABLE_LIMIT + 1)), "more than"),
        (columns(extra=1), "wrong columns"),
        (columns(names=["../x"]), "not a path"),
        (columns(names=["m.q", "m.q"]), "twice"),
        (columns(names=[3]), "not a path"),
        (columns(names=None), "not valid"),
        (columns(names=["m.q", "m.k"]), "not valid"),
        (columns(shapes=[[33, 20, 0]]), "0 is not an integer from 1"),
        (columns(shapes=[[33, 20]]), "not valid"),
        (columns(shapes=[[1 << 40, 20, 4]]), "is not an integer"),
        (columns(shapes=[[33.0, 20, 4]]), "33.0 is not an integer"),
        (columns(shape=[1]), "not valid"),
        (columns(shape=[-1]), "-1 is not an integer from 0"),
        (columns(formats=[["lm2:row", "lm9:row"]]), "unknown format|no lm code"),
        (columns(formats=[["lm2:row", "book2:row"]]), "book2:row is not a format of adapters"),
        (columns(formats=[["lm2:64+dq", "lm2:row"]]), "is not a format of adapters"),
        (columns(formats=[["lm2:64+shift", "lm2:row"]]), "is not a format of adapters"),
        (columns(formats=[["uniform2:tensor", "lm2:row"]]), "is not a format of adapters"),
        (columns(formats=[[2, "lm2:row"]]), "2 is not a format of adapters"),
        (columns(blocks=[[0, 0]]), "0 is not an integer from 1"),
        (columns(blocks=[[0, 3, 0]]), "not valid"),
        (columns(blocks=[[True, 3]]), "True is not an integer"),
        (columns(exponents=[[401, 0]]), "401 is not an integer"),
        (columns(exponents=[]), "as many exponents"),
        (columns(errors=[-1]), "-1 is not an integer"),
    ],
)
def test_a_table_that_lies_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"module table of the-adapter is not valid.*{words}|{words}"):
        read_table(data, "the-adapter")
