"""The merge verb: an adapter worked into a packed base, quantized again, with what that changed measured.

For each adapted matrix the base computes Q + s0*B0*A0 and the adapter adds s*B*A. Their sum M is quantized anew:

    codes new:   M ~ Q' + s0*B0'*A0'   by the base's own solver (LoftQ where a start is kept, rounding where not)
    codes kept:  Q' = Q, and B0'*A0' takes s*B*A in beside B0*A0 (their best product where the rank is too small)

and change = |M - merged| / |M| is what the base lost by it. A trained adapter moves a weight by far less than the step
of 2 to 4 bits, so new codes alone can round it away: that is why the change is also given relative to |s*B*A|, and why
merging is a verb with a report and not a method of a layer. Kept codes lose only the rounding of the adapter's factors
to the start's format, and cost the bits of a higher rank. Matrices that the adapter does not touch keep every byte.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitloft import __version__, card
from bitloft.checkpoint import (
    copy_companions,
    fingerprint,
    read_json,
    weight_files,
    write_json,
    write_manifest,
    writing,
)
from bitloft.errors import OptionError
from bitloft.evaluate import evaluate
from bitloft.factors import Factors, Pair, read_factors, stacked
from bitloft.formats import Format
from bitloft.integrations.loading import load, quiet_loading
from bitloft.integrations.mismatch import admitted
from bitloft.integrations.record import BaseRecord, base_record, stored_dtype
from bitloft.kernels.ops import decode
from bitloft.modules.adapted import linear_of
from bitloft.modules.linear import QuantLinear, quant_linears, replace_module
from bitloft.options import EvalOptions, MergeOptions, QuantizeOptions
from bitloft.rules import ModulePlan, StoredModule
from bitloft.solvers import Solution, solve
from bitloft.solvers.adapter import components
from bitloft.solvers.base import Start, pack_start, relative
from bitloft.solvers.lowrank import balanced_factors

REPORT = "bitloft_report.json"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class MergedMatrix:
    """One merged matrix. ``change`` is |M - merged| / |M|; ``of_adapter`` the same over the adapter's own norm |s*B*A|
    (above 1: quantizing changed the matrix by more than the adapter does)."""

    name: str
    format: str
    rank: int
    change: float
    of_adapter: float
    bytes: int
    start_bytes: int
    seconds: float


@dataclass(frozen=True)
class MergeReport:
    """What ``merge`` did. Losses are nats per token, of base with adapter and of the merged base; None without text.
    ``mismatch`` is set where the adapter does not name this base by fingerprint."""

    out: str
    base: str
    adapter: str
    fingerprint: str
    matrices: tuple[MergedMatrix, ...]
    untouched: int
    loss_before: float | None
    loss_after: float | None
    loss_base: float | None
    stored_bytes: int
    seconds: float
    mismatch: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    data: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeReport:
    """Write into ``out`` a complete new base that computes what ``base`` with ``adapter`` does, as nearly as it can.

    ``adapter`` is a PEFT directory or a packed adapter; ``data`` a text to measure the loss on, before and after.
    Settings are the fields of MergeOptions. Raises AdapterError for an adapter of another base or for modules that the
    base does not have, OptionError for a rank that a matrix cannot have, CheckpointError for damaged files.
    """
    options, began, base = options or MergeOptions(**settings), time.perf_counter(), Path(base)
    record, factors = base_record(base), read_factors(adapter)
    mismatch = admitted(factors, record, options.base_mismatch)
    losses = _losses(base, adapter, data, options, progress)
    with writing(out, overwrite=overwrite) as directory, torch.no_grad():
        model = load(base, dtype=stored_dtype(base))
        matrices = _merge_all(model, factors, options, progress)
        untouched = len(quant_linears(model).keys() - {m.name for m in matrices})
        with quiet_loading():
            model.save_pretrained(directory)
        del model
        copy_companions(base, directory)
        after = None if data is None else evaluate(directory, data, None, _eval_options(options), progress=progress)
        report = MergeReport(
            out=str(out),
            base=str(base),
            adapter=str(adapter),
            fingerprint=fingerprint(weight_files(directory)),
            matrices=tuple(matrices),
            untouched=untouched,
            loss_before=losses[1],
            loss_after=None if after is None else after.loss,
            loss_base=losses[0],
            stored_bytes=sum(f.stat().st_size for f in weight_files(directory)),
            seconds=time.perf_counter() - began,
            mismatch=mismatch,
        )
        _describe(directory, base, record, report)
    return report


def _losses(
    base: Path, adapter: str | Path, data: str | Path | None, options: MergeOptions, progress: Progress | None
) -> tuple[float | None, float | None]:
    """Loss of the base alone and with its adapter."""
    if data is None:
        return None, None
    alone = evaluate(base, data, None, _eval_options(options), progress=progress)
    adapted = evaluate(base, data, adapter, _eval_options(options), progress=progress)
    return alone.loss, adapted.loss


def _eval_options(options: MergeOptions) -> EvalOptions:
    return EvalOptions(
        length=options.length, limit=options.limit, batch=options.batch, base_mismatch=options.base_mismatch
    )


def _merge_all(
    model: PreTrainedModel, factors: Factors, options: MergeOptions, progress: Progress | None
) -> list[MergedMatrix]:
    config = model.config.quantization_config
    reports = []
    pairs = {name: pair for name, pair in factors.pairs.items() if pair.rank}  # a packed one may have dropped a module
    for done, (name, pair) in enumerate(pairs.items(), start=1):
        began, layer = time.perf_counter(), linear_of(model, name, pair, factors.path)
        if isinstance(layer, QuantLinear):
            kind = StoredModule.read(config.modules[name], config.options, name).kind
            solution, stored = _merged(name, layer, pair, options, config.options)
            change = _changes(layer.turned(layer.dense() + pair.product()), solution, pair)
            merged = _layer_of(layer, solution, stored)
            replace_module(model, name, merged)
            entry = StoredModule.of(stored, config.options, kind)
            config.modules[name] = entry.entry(config.options)
            start = solution.start
            size, start_size = solution.weight.nbytes, 0 if start is None else start.a.nbytes + start.bt.nbytes
            spelling, rank = stored.format, stored.start_rank
        else:
            change, spelling, rank, start_size = _merge_dense(layer, pair), str(layer.weight.dtype)[6:], 0, 0
            size = layer.weight.numel() * layer.weight.element_size()
        seconds = time.perf_counter() - began
        reports.append(MergedMatrix(name, spelling, rank, *change, size, start_size, seconds))
        if progress is not None:
            progress(done, len(pairs), name)
    return reports


def _merged(
    name: str, layer: QuantLinear, pair: Pair, options: MergeOptions, base: QuantizeOptions
) -> tuple[Solution, ModulePlan]:
    """The new codes and start of one matrix, and the settings that they are stored with."""
    rank = _rank(name, layer, pair, options)
    scaling = layer.scaling or 1.0
    solver = "loftq" if rank else "qlora"
    plan = ModulePlan(options.format or str(layer.format), solver, rank, scaling * rank, rotated=layer.rotated)
    if options.codes == "new":
        return solve(name, layer.dense() + pair.product(), plan, base), plan
    start = _grown_start(layer, pair, rank, scaling, Format.parse(base.start_format))
    return Solution(layer.packed_weight(), start, 0.0, 0.0), plan


def _grown_start(layer: QuantLinear, pair: Pair, rank: int, scaling: float, fmt: Format) -> Start:
    """A start of ``rank`` for s0*B0*A0 + s*B*A. With room for both, A0 and B0 are kept: what lies on a format's grid is
    not rounded again, and only the adapter is. Else the sum's leading components."""
    pair, a0 = replace(pair, a=layer.turned(pair.a)), layer.turned(layer.start_a())
    if rank >= layer.rank + pair.rank:
        a, bt = _balanced(pair, pair.rank, scaling)
        return pack_start(torch.cat([a0, a]), torch.cat([layer.start_b().T, bt]), scaling, fmt)
    both = stacked(Pair(a0, layer.scaling * layer.start_b()), pair)
    return pack_start(*_balanced(both, rank, scaling), scaling, fmt)


def _balanced(pair: Pair, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B^T [rank, rows] of the leading components, scaling * B @ A."""
    exact = components(pair.a, pair.b, 1.0)
    return balanced_factors(exact.u[:rank].T, exact.s[:rank], exact.v[:rank], scaling)


def _rank(name: str, layer: QuantLinear, pair: Pair, options: MergeOptions) -> int:
    """Rank of the merged start. With kept codes at most that of both products, which have no more components."""
    limit, rank = min(layer.in_features, layer.out_features), options.rank
    if rank is not None and rank > limit:
        raise OptionError(f"rank {rank} exceeds min(m, n) = {limit} of {name}; use a smaller rank.")
    if options.codes == "new":
        return layer.rank if rank is None else rank
    most = min(layer.rank + pair.rank, limit)
    return most if rank is None else min(rank, most)


def _changes(target: Float[Tensor, "rows columns"], solution: Solution, pair: Pair) -> tuple[float, float]:
    """|M - merged| over |M| and over |s*B*A| (0 for an adapter that changes nothing)."""
    merged = decode(solution.weight)
    if solution.start is not None:
        merged = merged + solution.start.product()
    return relative(target - merged, target), _over(target - merged, pair)


def _over(lost: Float[Tensor, "rows columns"], pair: Pair) -> float:
    own = float(torch.linalg.vector_norm(pair.product()))
    return float(torch.linalg.vector_norm(lost)) / own if own else 0.0


def _merge_dense(layer: nn.Linear, pair: Pair) -> tuple[float, float]:
    """Add to a weight that the base keeps in 16 or 32 bit; what rounding to that dtype loses."""
    target = layer.weight.data.float() + pair.product()
    layer.weight.data = target.to(layer.weight.dtype)
    lost = target - layer.weight.data.float()
    return relative(lost, target), _over(lost, pair)


def _layer_of(layer: QuantLinear, solution: Solution, plan: ModulePlan) -> QuantLinear:
    made = type(layer)(
        layer.in_features,
        layer.out_features,
        Format.parse(plan.format),
        bias=None if layer.bias is None else layer.bias.data,
        rank=plan.start_rank,
        scaling=plan.scaling,
        start_format=None if solution.start is None else solution.start.a.format,
        rotated=plan.rotated,
    )
    made.load_solution(solution)
    return made


def _describe(directory: Path, base: Path, record: BaseRecord, report: MergeReport) -> None:
    """Report, card and manifest. Matrices that were not merged keep what the base's report says of them."""
    merged = {m.name for m in report.matrices}
    old = read_json(base / REPORT) if (base / REPORT).exists() else {}
    write_json(
        directory / REPORT,
        old | {"matrices": [_row(m, merged) for m in old.get("matrices", [])], "merge": report.to_dict()},
    )
    (directory / "README.md").write_text(card.of_merged(report), encoding="utf-8")
    lineage = {"base": record.fingerprint, "source": record.source, "adapter": report.adapter}
    extra = {"fingerprint": report.fingerprint, "source": None, "bitloft_version": __version__, "merged": lineage}
    write_manifest(directory, "base", extra)


def _row(matrix: dict[str, Any], merged: set[str]) -> dict[str, Any]:
    """Errors in a base's report are against the source model's weight, which a merged matrix no longer stands for."""
    return {k: v for k, v in matrix.items() if matrix["name"] not in merged or not k.startswith("error")}
