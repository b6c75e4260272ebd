"""Compress a directory of adapters: each into a directory of its own, kept between runs, failures as rows.

    DIR/name/adapter_config.json ...  ->  OUT/name/ (packed), OUT/reports/{name.json, index.html}, OUT/report.json

A name that is packed already from the same source bytes with the same settings is left as it is, so a run that was
killed goes on where it stopped; a packed adapter appears whole or not at all. Processes, not threads, share the work:
torch's own threads do not help matrices this small. An adapter that cannot be packed costs one row with its sentence.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from bitloft.adapters import CONFIG_FILE, WEIGHTS_FILE, is_packed, read_packed
from bitloft.checkpoint import fingerprint, read_json
from bitloft.compress import CompressReport, compress
from bitloft.errors import BitloftError, CheckpointError, OptionError
from bitloft.integrations.ray import Cluster, spread
from bitloft.options import CompressOptions
from bitloft.packing import Progress
from bitloft.report import Figure, Section, Table, lines, page, write

REPORTS = "reports"
SUMMARY = "report.json"
SIGN = "cluster.txt"  # in reports: what the nodes of a cluster know the directory by


@dataclass(frozen=True)
class Row:
    """One adapter of a bulk run: ``state`` is packed, kept (from an earlier run) or failed, ``reason`` why."""

    name: str
    state: str
    true_bits: float | None = None
    payload_bits: float | None = None
    error: float | None = None
    bytes: int | None = None
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class BulkReport:
    """All rows in name order."""

    directory: str
    out: str
    method: dict[str, Any]
    rows: tuple[Row, ...]

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)


def holds_adapters(directory: Path) -> bool:
    """True for a directory whose subdirectories are adapters, and which is none itself."""
    return directory.is_dir() and not (directory / CONFIG_FILE).exists() and any(directory.glob(f"*/{CONFIG_FILE}"))


def adapters_in(directory: Path) -> list[Path]:
    """The subdirectories of ``directory`` that hold an adapter's config, by name.

    Raises CheckpointError where ``directory`` is none or holds no adapter.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give an adapter, or a directory of adapters.")
    found = sorted(p for p in directory.iterdir() if (p / CONFIG_FILE).is_file() and not p.name.startswith("."))
    if not found:
        raise CheckpointError(f"{directory} holds no adapter: no {CONFIG_FILE} in it or in any of its subdirectories.")
    return found


def compress_all(
    directory: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    base: str | Path | None = None,
    data: str | Path | None = None,
    jobs: int = 1,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> BulkReport:
    """Pack every adapter below ``directory`` into ``out`` by ``jobs`` processes; ``progress`` counts adapters.

    With a ``cluster`` adapters are tasks on Ray and ``jobs`` is not used; every node must see the same directories.

    What is packed already from the same source with the same settings is kept; a place in ``out`` that holds something
    else is a failed row, never overwritten. Raises OptionError for fewer than one job, CheckpointError without
    adapters.
    """
    directory, out, options = Path(directory), Path(out), options or CompressOptions()
    if jobs < 1:
        raise OptionError(f"jobs is {jobs}; use 1 or more.")
    if cluster is not None and (jobs != 1 or cluster.threads != 1):
        raise OptionError("adapters are packed with one thread each by the workers of the cluster; leave jobs at 1.")
    for name, does in (("distill", "learns from"), ("weigh", "measures")):
        if getattr(options, name):
            raise OptionError(f"{name} {does} one adapter's own data; pack the adapters one by one.")
    sources = adapters_in(directory)
    if any(source.name == REPORTS for source in sources):
        raise CheckpointError(f"an adapter in {directory} is named {REPORTS!r}, where reports are written; rename it.")
    (out / REPORTS).mkdir(parents=True, exist_ok=True)
    rows = []
    for row in _rows(sources, out, options, base, data, jobs, cluster):
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(sources), row.name)
    (out / REPORTS / SIGN).unlink(missing_ok=True)
    report = BulkReport(str(directory), str(out), options.settings, tuple(sorted(rows, key=lambda r: r.name)))
    write(out / SUMMARY, json.dumps(asdict(report), indent=2))
    write(out / REPORTS / "index.html", _page(report, out / REPORTS))
    return report


def _rows(
    sources: list[Path],
    out: Path,
    options: CompressOptions,
    base: str | Path | None,
    data: str | Path | None,
    jobs: int,
    cluster: Cluster | None,
) -> Iterator[Row]:
    if cluster is not None:
        setup = (_signed(out), out.absolute(), options, _absolute(base), _absolute(data))
        yield from (row for _, row in spread(cluster, _sees, setup, _on_cluster, [s.absolute() for s in sources]))
        return
    if jobs == 1:
        yield from (_one(source, out, options, base, data) for source in sources)
        return
    # spawn: a forked child would inherit torch's threads in an unknown state
    with ProcessPoolExecutor(min(jobs, len(sources)), get_context("spawn"), initializer=_single_thread) as pool:
        waiting = [pool.submit(_one, source, out, options, base, data) for source in sources]
        yield from (done.result() for done in as_completed(waiting))


Place = tuple[Path, CompressOptions, Path | None, Path | None]  # out, options, base, data


def _absolute(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).absolute()


def _signed(out: Path) -> str:
    """A text in a file of ``out``, by which a node shows that it sees the same directory."""
    text = uuid4().hex
    write(out / REPORTS / SIGN, text)
    return text


def _sees(sign: str, *place: Any) -> Place:
    """In a worker process: ready to pack. Raises CheckpointError on a node that sees another ``out``."""
    _single_thread()
    file = place[0] / REPORTS / SIGN
    if not file.is_file() or file.read_text(encoding="utf-8") != sign:
        raise CheckpointError(f"this node does not see {place[0]} as the others do; put it on shared storage.")
    return place[0], place[1], place[2], place[3]


def _on_cluster(place: Place, source: Path) -> Row:
    return _one(source, *place)


def _single_thread() -> None:
    torch.set_num_threads(1)


def _one(source: Path, out: Path, options: CompressOptions, base: str | Path | None, data: str | Path | None) -> Row:
    target, record = out / source.name, out / REPORTS / f"{source.name}.json"
    try:
        digest = _fingerprint(source)
        kept = _kept(target, record, options, digest)
        if kept is not None:
            return kept
        begun = record.is_file() and read_json(record) == {"source": digest}  # killed before its record was whole
        write(record, json.dumps({"source": digest}))
        report = compress(source, target, options, base=base, data=data, overwrite=begun)
        write(record, json.dumps(_record(report, source, digest), indent=2))
    except (BitloftError, OSError) as error:
        return Row(source.name, "failed", reason=str(error))
    bits = (report.true_bits, report.payload_bits, report.error)
    notes = report.notes if report.mismatch is None else (*report.notes, report.mismatch)
    return Row(source.name, "packed", *bits, report.bytes, report.seconds, "; ".join(notes))


def _fingerprint(source: Path) -> str:
    return fingerprint(p for name in (CONFIG_FILE, WEIGHTS_FILE) if (p := source / name).is_file())


def _kept(target: Path, record: Path, options: CompressOptions, digest: str) -> Row | None:
    """The row of an earlier run, None where there is none; the packed files are read and verified."""
    if not is_packed(target):
        return None
    known = read_json(record) if record.is_file() else {}
    if known == {"source": digest}:
        return None
    packed = read_packed(target)
    if known.get("source") != digest or known.get("sha256") != packed.sha256 or packed.method != options.settings:
        raise CheckpointError(
            f"{target} was packed from another source or with other settings; remove it, or choose another --out."
        )
    row = (packed.true_bits, packed.payload_bits, packed.error, known["bytes"])
    return Row(target.name, "kept", *row, reason="packed by an earlier run")


def _record(report: CompressReport, source: Path, digest: str) -> dict[str, Any]:
    """A CompressReport as JSON, with the source's digest, the packed manifest's, and the spectrum before packing."""
    found = asdict(report) | {"source": digest, "sha256": read_packed(report.out).sha256}
    return found | {"adapter": source.name, "out": source.name}


def _page(report: BulkReport, reports: Path) -> str:
    columns = ("adapter", "state", "true bits", "payload bits", "error", "bytes", "note")
    cells = tuple(
        (r.name, r.state, _cell(r.true_bits), _cell(r.payload_bits), _cell(r.error), str(r.bytes or ""), r.reason)
        for r in report.rows
    )
    sections = [Section("Adapters", (Table(columns, cells),))]
    for row in report.rows:
        file = reports / f"{row.name}.json"
        if row.state != "failed" and file.is_file():
            sections.append(Section(row.name, _parts(read_json(file))))
    return page(f"Compressed adapters: {report.directory}", sections)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _parts(record: dict[str, Any]) -> tuple[str | Table | Figure, ...]:
    """Errors per module, and the spectra where matplotlib is installed."""
    modules = record["modules"]
    rows = tuple((m["name"], str(m["rank"]), _cell(m["bits"]), _cell(m["error"])) for m in modules)
    table = Table(("module", "rank", "bits", "error"), rows)
    series = {m["name"]: [(float(i), share) for i, share in enumerate(m["spectrum"], 1)] for m in _extremes(modules)}
    try:
        figure = lines(series, x="component", y="share of the energy", caption="Spectra: steepest, middle and flattest")
    except OptionError as error:
        return (table, f"No plot of the spectra: {error}")
    return (table, figure)


def _extremes(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The modules with the largest, the middle and the smallest share of energy in their first component."""
    ordered = sorted((m for m in modules if m["spectrum"]), key=lambda m: -float(m["spectrum"][0]))
    return [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})] if ordered else []
