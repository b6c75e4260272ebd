"""Methods that the packed file has no place for (masks, another axis, bases of a set): float factors, bytes counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapter_grid.plan import Way
from bitloft.adapters import Adapter, LoraPair, read_adapter
from bitloft.factors import Pair, write_lora
from bitloft.packing import block_bytes
from bitloft.solvers.adapter import Components, Loose, PackedBlock, Trained, components, factors, product_error
from bitloft.solvers.baselines import billm, pb_llm, truncated
from bitloft.solvers.joint import joint_diagonal
from bitloft.solvers.loraquant import loraquant_across

LOOSE = ("pb_llm", "billm", "loraquant across", "truncate 16 by norm")
NOTE = "factors only, no file"


def loose(source: Path, out: Path, way: Way, values: int) -> dict[str, Any]:
    """Write the factors of a method that has no file as a plain adapter; its figures, for ``values`` trained values."""
    adapter = read_adapter(source)
    exact = [components(pair.a, pair.b, pair.scaling) for pair in adapter.pairs]
    made = [_made(way, found, pair) for found, pair in zip(exact, adapter.pairs, strict=True)]
    return _written(adapter, exact, made, out, values)


def _made(way: Way, exact: Components, pair: LoraPair) -> Loose | PackedBlock:
    trained = Trained(pair.a, (pair.scaling * pair.b).T.contiguous())
    if way.method == "truncate 16 by norm":
        (block,) = truncated(exact, trained, rank=int(str(way.asked)), width=16, by="norm")
        return block
    if way.method == "loraquant across":
        return loraquant_across(exact, high=2, ratio=0.8)
    return pb_llm(trained) if way.method == "pb_llm" else billm(trained)


def joint(sources: Sequence[Path], outs: Sequence[Path], rank: int) -> list[dict[str, Any]]:
    """Joint diagonalization over a set of adapters of the same modules; the bases' bytes are shared out evenly."""
    adapters = [read_adapter(source) for source in sources]
    exact = [[components(pair.a, pair.b, pair.scaling) for pair in adapter.pairs] for adapter in adapters]
    made = [joint_diagonal(module, rank) for module in zip(*exact, strict=True)]
    return [
        _written(adapter, found, [module[i] for module in made], out, adapter.values)
        for i, (adapter, found, out) in enumerate(zip(adapters, exact, outs, strict=True))
    ]


def _written(
    adapter: Adapter, exact: Sequence[Components], made: Sequence[Loose | PackedBlock], out: Path, values: int
) -> dict[str, Any]:
    pairs, size, lost = {}, 0, 0.0
    for pair, found, block in zip(adapter.pairs, exact, made, strict=True):
        a, bt = factors(block)
        pairs[pair.name] = Pair(a, bt.T.contiguous())
        size += block.nbytes if isinstance(block, Loose) else block_bytes(block)
        lost += product_error(found, [block])
    record = {"base": adapter.base, "source": adapter.source, "start": adapter.start}
    write_lora(out, pairs, base_name=str(adapter.config.get("base_model_name_or_path")), record=record)
    error = lost / sum(found.energy for found in exact)
    return {"true_bits": 8 * size / values, "payload_bits": None, "error": error, "note": NOTE}
