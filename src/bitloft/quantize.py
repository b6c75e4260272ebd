"""The quantize verb: a model in, a complete packed base out (weights, start, tokenizer, template, card, manifest).

Matrices stream one by one from the source's files into the output's (``stream.py``), in OUT.work until all is there;
then the directory is renamed. A run that was killed, or that filled the disk, goes on with ``resume`` and ends with the
same bytes. For that, nothing in the directory tells when or how fast it was made but ``bitloft_times.json``, which the
manifest does not list.
"""

import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn

from bitloft import __version__, card
from bitloft.calibrate.refine import RefineReport, refine, sequences
from bitloft.calibrate.run import Calibration, run_calibrated
from bitloft.checkpoint import (
    copy_companions,
    fingerprint,
    read_tensors,
    replace_tensors,
    weight_files,
    write_json,
    write_manifest,
)
from bitloft.errors import CheckpointError, OptionError
from bitloft.fanout import fanned
from bitloft.formats import Format
from bitloft.integrations.ray import Cluster
from bitloft.integrations.skeleton import UNPACKED
from bitloft.integrations.source import Source, open_source
from bitloft.journal import Journal, check_free, working
from bitloft.options import QuantizeOptions
from bitloft.shards import INDEX
from bitloft.slots import Slots, bytes_of, lay_out, reserve, write
from bitloft.stream import Plan, Progress, in_turn, make_plan, run
from bitloft.widths import Widths, choose_widths, perplexity_of

REPORT = "bitloft_report.json"
TIMES = "bitloft_times.json"
REFINE = "refine"  # the journal's name for the tuning, and its directory
SHARD = "50GB"  # as transformers saves: a base that is loaded and saved again keeps its bytes


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


def quantize(
    model: str | Path,
    out: str | Path,
    options: QuantizeOptions | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
    threads: int = 1,
    shard_size: str = SHARD,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeReport:
    """Quantize ``model`` (hub name, safetensors folder or its URL, GGUF file) into the directory ``out``.

    Settings are the fields of QuantizeOptions: ``quantize("m", "out", format="lm2:64", rank=16)``. ``jobs`` processes
    work on matrices of their own with ``threads`` threads each: jobs do not change the bytes, threads may, in the last
    digit of an error. (Processes are spawned: a script that asks for jobs needs ``if __name__ == "__main__":``.)
    With a ``cluster`` matrices are tasks on Ray and ``jobs`` is not used; the bytes are the same at equal ``threads``.
    ``resume`` goes on where an interrupted run of the same settings stopped. Raises OptionError for options that do
    not exist or fit, CheckpointError for a source that is missing, unsafe or damaged, and for a full disk.
    """
    options = options or QuantizeOptions(**settings)
    limit, began = bytes_of(shard_size, "shard_size"), time.perf_counter()
    _check_run(str(model), jobs, threads, options)
    _check_cluster(str(model), jobs, threads, cluster)
    check_free(out, overwrite=overwrite, resume=resume)
    source = open_source(str(model))
    options, widths = choose_widths(source, options, progress, partial(_tried, model, Path(out), threads))
    plan = make_plan(source, options)
    if options.refine:
        sequences(source, plan, options)  # what cannot be refined is refused now, not after hours
    tokenizer = source.tokenizer if plan.skeleton.known else None
    made_of = source.fingerprint()
    identity = _identity(made_of, options, threads, limit)
    with (
        working(out, identity, overwrite=overwrite, resume=resume) as journal,
        fanned(str(model), options, cluster) as spread,
    ):
        directory = journal.directory
        slots = lay_out(directory, plan.outputs, limit)
        resumed = _prepare(slots, journal)
        calibration = None
        if plan.measured:
            calibration = run_calibrated(
                source, options, plan, slots, journal, threads=threads, progress=progress, spread=spread or in_turn
            )
        else:
            run(source, options, plan, slots, journal, jobs=jobs, threads=threads, progress=progress, spread=spread)
        if slots.index is not None:
            write_json(directory / INDEX, slots.index)
        _save_settings(plan, source, tokenizer, directory)
        refined = _refine(source, options, plan, slots, journal, progress) if options.refine else None
        report = _report(str(out), source, plan, journal, directory)
        report = replace(report, resumed=resumed, widths=widths, refined=refined, calibration=calibration)
        report = replace(report, seconds=time.perf_counter() - began)
        _finish(report, options, made_of, Path(out).name, directory)
    return report


def _finish(report: QuantizeReport, options: QuantizeOptions, made_of: str, name: str, directory: Path) -> None:
    """Write report, card and manifest; and the times, which the manifest does not list."""
    write_json(directory / REPORT, report.lasting())
    (directory / "README.md").write_text(card.of_base(replace(report, out=name), options), encoding="utf-8")
    (directory / TIMES).unlink(missing_ok=True)
    record = {"fingerprint": report.fingerprint, "source": made_of, "bitloft_version": __version__}
    write_manifest(directory, "base", record)
    times = {matrix.name: matrix.seconds for matrix in report.matrices}
    stages = {} if report.calibration is None else {"stages": report.calibration.seconds}
    write_json(directory / TIMES, {"seconds": report.seconds, "resumed": report.resumed, "matrices": times, **stages})


def _tried(model: str | Path, out: Path, threads: int, options: QuantizeOptions, text: str) -> float:
    """The perplexity of a base made by ``options`` in one round, without refining; beside ``out``, and then gone."""
    quick = replace(options, rounds=1, sweeps=0, refine=0, refine_parts=("start",), statistics=None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as place:
        quantize(model, Path(place) / "base", quick, threads=threads)
        return perplexity_of(Path(place) / "base", text)


def _check_run(model: str, jobs: int, threads: int, options: QuantizeOptions) -> None:
    calibrated = options.solver == "calibrated" and options.metric != "none"
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value < 1:
            raise OptionError(f"{name} is {value}; use 1 or more.")
    if jobs > 1 and calibrated:
        raise OptionError(f"jobs is {jobs}, but calibration goes block by block; use jobs 1 and more threads.")
    if jobs > 1 and model.endswith(".gguf"):
        raise OptionError(f"jobs is {jobs}, but a GGUF file is converted whole, by each process; use 1.")


def _check_cluster(model: str, jobs: int, threads: int, cluster: Cluster | None) -> None:
    if cluster is None:
        return
    if model.endswith(".gguf"):
        raise OptionError("a GGUF file is converted whole, by each process; quantize it on one machine, with jobs 1.")
    if jobs != 1:
        raise OptionError(f"jobs is {jobs}, but a cluster has workers of its own; give their number there.")
    if cluster.threads != threads:
        raise OptionError(f"threads is {threads}, and that of the cluster is {cluster.threads}; give the same twice.")


def _identity(source: str, options: QuantizeOptions, threads: int, limit: int) -> dict[str, Any]:
    """Everything that decides the bytes: an interrupted run that is continued must agree in it."""
    return {
        **asdict(options),
        "source": source,
        "threads": threads,
        "shard_size": limit,
        "bitloft": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _prepare(slots: Slots, journal: Journal) -> int:
    """Make the output's files, or find those of the interrupted run; how many matrices are in them."""
    for name, (_, size) in slots.files.items() if journal.done else ():
        file = journal.directory / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"the interrupted run lost its file {file}; remove its directory to begin anew.")
    reserve(journal.directory, slots)
    return sum(len(record.get("matrices", ())) for record in journal.done.values())


def _save_settings(plan: Plan, source: Source, tokenizer: Any, directory: Path) -> None:
    """Config, generation config and tokenizer, as transformers saves them; of an unknown architecture as they are."""
    model, settings = plan.skeleton.model, plan.quantizer.quantization_config
    if plan.skeleton.known:
        model.config.quantization_config = settings
        floats = (spec.dtype for spec in plan.skeleton.dense().values() if spec.dtype in _DTYPES)
        model.config.dtype = model.config.dtype or _DTYPES[next(floats, "F32")]
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return
    write_json(directory / "config.json", source.config() | {"quantization_config": settings.to_dict()})
    copy_companions(Path(source.folder), directory)


def _refine(
    source: Source, options: QuantizeOptions, plan: Plan, slots: Slots, journal: Journal, progress: Progress | None
) -> RefineReport:
    """Tune the finished base and write what changed in its old places.

    What is to be written is kept first: a run that is killed while it writes has lost what the tuning began from.
    """
    work = journal.directory.parent / REFINE
    kept = work / "changed.safetensors"
    if REFINE not in journal.done:
        found = refine(source, options, plan, journal.directory, work, progress)
        replace_tensors(kept, found.tensors)
        journal.add(REFINE, {"report": asdict(found.report), "errors": found.errors})
    write(slots, ((name, [tensor]) for name, tensor in read_tensors(kept).items()))
    return RefineReport.read(journal.done[REFINE]["report"])


_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def _report(out: str, source: Source, plan: Plan, journal: Journal, directory: Path) -> QuantizeReport:
    rows = []
    again = journal.done.get(REFINE, {}).get("errors", {})
    for name in plan.steps:
        record = journal.done[name]
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
