"""The quantize verb: a model in, a complete packed base out (weights, start, tokenizer, template, card, manifest).

Matrices stream one by one from the source's files into the output's (``stream.py``), in OUT.work until all is there;
then the directory is renamed. A run that was killed, or that filled the disk, goes on with ``resume`` and ends with the
same bytes. For that, nothing in the directory tells when or how fast it was made but ``bitloft_times.json``, which the
manifest does not list.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from bitloft import __version__, card
from bitloft.calibrate.refine import RefineReport, refine, sequences
from bitloft.calibrate.run import run_calibrated
from bitloft.checkpoint import (
    copy_companions,
    read_tensors,
    replace_tensors,
    write_json,
    write_manifest,
)
from bitloft.errors import CheckpointError, OptionError
from bitloft.fanout import fanned
from bitloft.integrations.ray import Cluster
from bitloft.integrations.remote import is_url
from bitloft.integrations.source import Source, open_source
from bitloft.integrations.upload import check_place, staged, upload
from bitloft.journal import Journal, check_free, working
from bitloft.options import QuantizeOptions
from bitloft.quantize_report import QuantizeReport, report_of
from bitloft.shards import INDEX
from bitloft.slots import Slots, bytes_of, lay_out, reserve, write
from bitloft.stream import Plan, Progress, in_turn, make_plan, run
from bitloft.widths import choose_widths, perplexity_of

REPORT = "bitloft_report.json"
TIMES = "bitloft_times.json"
REFINE = "refine"  # the journal's name for the tuning, and its directory
SHARD = "50GB"  # as transformers saves: a base that is loaded and saved again keeps its bytes


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
    stage: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeReport:
    """Quantize ``model`` (hub name, safetensors folder or its URL, GGUF file) into the directory ``out``, or its URL.

    Settings are the fields of QuantizeOptions: ``quantize("m", "out", format="lm2:64", rank=16)``. ``jobs`` processes
    work on matrices of their own with ``threads`` threads each: jobs do not change the bytes, threads may, in the last
    digit of an error. (Processes are spawned: a script that asks for jobs needs ``if __name__ == "__main__":``.)
    With a ``cluster`` matrices are tasks on Ray and ``jobs`` is not used; the bytes are the same at equal ``threads``.
    An ``out`` in object storage is made in ``stage`` (the current directory) and then sent, its manifest last.
    ``resume`` goes on where an interrupted run of the same settings stopped. Raises OptionError for options that do
    not exist or fit, CheckpointError for a source that is missing, unsafe or damaged, and for a full disk.
    """
    options = options or QuantizeOptions(**settings)
    limit, began = bytes_of(shard_size, "shard_size"), time.perf_counter()
    _check_run(str(model), jobs, threads, options, cluster)
    place, finish = _destination(str(out), stage, overwrite=overwrite, resume=resume)
    source = open_source(str(model))
    options, widths = choose_widths(source, options, progress, partial(_tried, model, place, threads))
    plan = make_plan(source, options)
    if options.refine:
        sequences(source, plan, options)  # what cannot be refined is refused now, not after hours
    tokenizer = source.tokenizer if plan.skeleton.known else None
    made_of = source.fingerprint()
    identity = _identity(made_of, options, threads, limit)
    with (
        working(place, identity, overwrite=overwrite, resume=resume, finish=finish) as journal,
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
        report = report_of(str(out), source, plan, journal.done, directory, journal.done.get(REFINE, {}))
        report = replace(report, resumed=resumed, widths=widths, refined=refined, calibration=calibration)
        report = replace(report, seconds=time.perf_counter() - began)
        _finish(report, options, made_of, Path(out).name, directory)
    return report


def _destination(
    out: str, stage: str | Path | None, *, overwrite: bool, resume: bool
) -> tuple[Path, Callable[[Journal], None] | None]:
    """The directory that is made on this machine, and what takes it to ``out`` where that is a URL; first whether
    either is free."""
    place = staged(out, stage) if is_url(out) else Path(out)
    check_free(place, overwrite=overwrite, resume=resume)
    if not is_url(out):
        return place, None
    check_place(out, overwrite=overwrite, resume=resume)
    return place, lambda journal: upload(journal.directory, out, journal, overwrite=overwrite)


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


def _check_run(model: str, jobs: int, threads: int, options: QuantizeOptions, cluster: Cluster | None) -> None:
    calibrated = options.solver == "calibrated" and options.metric != "none"
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value < 1:
            raise OptionError(f"{name} is {value}; use 1 or more.")
    if jobs > 1 and calibrated:
        raise OptionError(f"jobs is {jobs}, but calibration goes block by block; use jobs 1 and more threads.")
    if jobs > 1 and model.endswith(".gguf"):
        raise OptionError(f"jobs is {jobs}, but a GGUF file is converted whole, by each process; use 1.")
    _check_cluster(model, jobs, threads, cluster)


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
