"""What quantizing did: every packed matrix with its errors and bytes, and what they add up to."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from bitloft.calibrate.refine import RefineReport
from bitloft.calibrate.run import Calibration
from bitloft.checkpoint import fingerprint, weight_files
from bitloft.formats import Format
from bitloft.integrations.skeleton import UNPACKED
from bitloft.integrations.source import Source
from bitloft.stream import Plan
from bitloft.widths import Widths


@dataclass(frozen=True)
class MatrixReport:
    """One packed matrix. Errors are relative Frobenius norms; bits count scales and padding. ``calibrated`` holds what
    ``solvers.base.Calibrated`` says: errors where inputs are, damping and tokens; None for other solvers."""

    name: str
    format: str
    shape: tuple[int, ...]
    error_before: float
    error_after: float
    bytes: int
    start_bytes: int
    seconds: float
    calibrated: dict[str, Any] | None = None

    @property
    def weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class QuantizeReport:
    """What ``quantize`` did. Bytes are those of stored tensors; ``true_bits`` are per weight of the packed matrices.

    ``resumed`` counts the matrices that an earlier, interrupted run had finished; ``seconds`` are this run's.
    ``widths`` is what ``target_bits`` came to.
    """

    out: str
    source: str
    fingerprint: str
    matrices: tuple[MatrixReport, ...]
    left: dict[str, str]
    ignored: tuple[str, ...]
    embedding_bytes: int
    other_bytes: int
    source_bytes: int
    stored_bytes: int
    seconds: float
    selection: str = "by the model class"
    resumed: int = 0
    widths: Widths | None = None
    refined: RefineReport | None = None
    calibration: Calibration | None = None

    @property
    def weights(self) -> int:
        return sum(m.weights for m in self.matrices)

    @property
    def formats(self) -> str:
        """The formats and how many matrices each has, most common first; the name alone where there is one."""
        counts = Counter(m.format for m in self.matrices).most_common()
        return counts[0][0] if len(counts) == 1 else ", ".join(f"{fmt} ({count})" for fmt, count in counts)

    @property
    def payload_bits(self) -> float:
        """Bits of codes per packed weight: the number that papers quote."""
        return sum(Format.parse(m.format).bits * m.weights for m in self.matrices) / self.weights

    @property
    def true_bits(self) -> float:
        """Bits per packed weight, start left out."""
        return 8 * sum(m.bytes for m in self.matrices) / self.weights

    @property
    def true_bits_with_start(self) -> float:
        return 8 * sum(m.bytes + m.start_bytes for m in self.matrices) / self.weights

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for total in ("weights", "payload_bits", "true_bits", "true_bits_with_start"):
            found[total] = getattr(self, total)
        for row, matrix in zip(found["matrices"], self.matrices, strict=True):
            row["true_bits"] = 8 * matrix.bytes / matrix.weights
        return found

    def lasting(self) -> dict[str, Any]:
        """The part that depends on source and settings alone: what is written beside the weights."""
        found = self.to_dict()
        for key in ("out", "seconds", "resumed"):
            del found[key]
        for row in found["matrices"]:
            del row["seconds"]
        for key in ("gathered", "reused", "seconds") if self.calibration is not None else ():
            del found["calibration"][key]
        return found


def report_of(
    out: str,
    source: Source,
    plan: Plan,
    done: Mapping[str, dict[str, Any]],
    directory: Path,
    tuned: Mapping[str, Any],
) -> QuantizeReport:
    """What the finished steps of ``plan`` (``done``, by name) came to in ``directory``. ``tuned`` is the record of
    what was tuned afterwards: its errors by matrix."""
    rows, again = [], tuned.get("errors", {})
    for name in plan.steps:
        record = done[name]
        share = record["seconds"] / len(record["matrices"])
        for row in record["matrices"]:
            before, after = again.get(row["name"], (row["error_before"], row["error_after"]))
            errors = {"error_before": before, "error_after": after}
            rows.append(MatrixReport(**row | {"shape": tuple(row["shape"])} | errors, seconds=share))
    embedding, other = _unpacked_bytes(plan)
    read = {name for reading in plan.skeleton.readings for name in reading.sources}
    return QuantizeReport(
        out=out,
        source=source.name,
        fingerprint=fingerprint(weight_files(directory)),
        matrices=tuple(rows),
        left=plan.left,
        ignored=source.ignored,
        embedding_bytes=embedding,
        other_bytes=other,
        source_bytes=sum(plan.skeleton.tensors[name].spec.nbytes for name in read),
        stored_bytes=sum(f.stat().st_size for f in weight_files(directory)),
        seconds=0.0,
        selection="by the model class" if plan.skeleton.known else "by names and shapes: no class is known",
    )


def _unpacked_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of embeddings (input, and head where it is not tied) and of everything else that is not packed."""
    model = plan.skeleton.model
    head = model.get_output_embeddings() if plan.skeleton.known else None
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding) or (head is not None and m is head)}
    packed = {output for matrix in plan.matrices for output in matrix.outputs}
    embedding = other = 0
    for name, spec in plan.outputs.items():
        module, _, leaf = name.rpartition(".")
        table = module in tables if plan.skeleton.known else bool(UNPACKED.search(name)) and len(spec.shape) == 2
        if name not in packed:
            embedding += spec.nbytes if table and leaf == "weight" else 0
            other += 0 if table and leaf == "weight" else spec.nbytes
    return embedding, other
