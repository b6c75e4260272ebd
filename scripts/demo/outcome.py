"""What the demo leaves: one table (terminal, README, page), plots, demo/report.html and demo/results.json."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import bitloft
from bitloft.formats import Format
from bitloft.report import Section, Table, bars, lines, page, pm, size, write
from scripts.demo.ledger import Ledger, Result
from scripts.demo.settings import FORMATS, TRAINED_ON

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
NONE = "—"


def table(found: Result, seconds: Mapping[str, float]) -> Table:
    """One row a thing that is stored: its bytes, bits and what it does to both skills' held-out text."""
    skills = tuple(found["data"])
    measured = [f"perplexity, {skill}" for skill in skills]
    columns = ("", "stored", "without embeddings", "true bits", "payload bits", *measured, "made in")
    rows = [dense_row(found, skills, seconds)]
    rows += [base_row(found, name, skills, seconds) for name in FORMATS]
    rows.append(trained_row(found, skills, seconds))
    rows += [packed_row(found, way, skills, seconds) for way in found["packed"]]
    return Table(columns, tuple(rows), note(found))


def note(found: Result) -> str:
    model, embedding = found["model"], found["bases"][TRAINED_ON]["embedding_bytes"]
    already = f" Its weights had been rounded to {model['already']} before." if model["already"] else ""
    return (
        f"Model: {model['origin']}.{already} Embeddings stay in 16 bit and take {size(embedding)} of every model row. "
        "Bits are per stored value: weights of the packed matrices, values of the adapter; true bits count scales, "
        f"names and headers. Adapters are for the {TRAINED_ON} base, with its start frozen; sizes are of one adapter. "
        "Perplexity on held-out rows ± its standard error; at 2 bits the loss in nats."
    )


def dense_row(found: Result, skills: tuple[str, ...], seconds: Mapping[str, float]) -> tuple[str, ...]:
    cells = (perplexity(found["eval"]["16-bit"][skill]) for skill in skills)
    stored = found["model"]["stored_bytes"]
    rest = stored - found["bases"][TRAINED_ON]["embedding_bytes"]
    return ("16-bit folder", size(stored), size(rest), "16", NONE, *cells, took(seconds["model"]))


def base_row(found: Result, name: str, skills: tuple[str, ...], seconds: Mapping[str, float]) -> tuple[str, ...]:
    base, results = found["bases"][name], found["eval"][name]
    show = loss if name == "2-bit" else perplexity
    stored, embedding, dense = base["stored_bytes"], base["embedding_bytes"], found["model"]["stored_bytes"]
    return (
        f"base {FORMATS[name]} + start",
        share(stored, dense),
        share(stored - embedding, dense - embedding),
        f"{base['true_bits_with_start']:.2f}",
        str(Format.parse(FORMATS[name]).bits),
        *(show(results[skill]) for skill in skills),
        took(seconds[f"base-{name}"]),
    )


def trained_row(found: Result, skills: tuple[str, ...], seconds: Mapping[str, float]) -> tuple[str, ...]:
    values = [found["packed"]["waterfill"][skill] for skill in skills]
    bits = 8 * values[0]["source_bytes"] / values[0]["values"]
    cells = (perplexity(found["eval"]["trained"][skill]) for skill in skills)
    time = sum(seconds[f"train-{skill}"] for skill in skills)
    return ("+ adapter as trained", size(values[0]["source_bytes"]), NONE, f"{bits:.1f}", NONE, *cells, took(time))


def packed_row(found: Result, way: str, skills: tuple[str, ...], seconds: Mapping[str, float]) -> tuple[str, ...]:
    packed = [found["packed"][way][skill] for skill in skills]
    label = {"waterfill": "+ adapter, waterfill", "loraquant": "+ adapter, LoRAQuant 2@0.8"}[way]
    return (
        label,
        size(max(p["bytes"] for p in packed)),
        NONE,
        span([p["true_bits"] for p in packed]),
        span([p["payload_bits"] for p in packed]),
        *(perplexity(found["eval"][way][skill]) for skill in skills),
        took(sum(seconds[f"{way}-{skill}"] for skill in skills)),
    )


def share(part: int, whole: int) -> str:
    return f"{size(part)} ({part / whole:.0%})"


def perplexity(result: Result) -> str:
    return pm(result["perplexity"], result["perplexity_stderr"])


def loss(result: Result) -> str:
    return f"{pm(result['loss'], result['stderr'])} (loss)"


def span(values: list[float]) -> str:
    """One number where all agree to two digits, else lowest-highest."""
    texts = sorted({f"{value:.2f}" for value in values})
    return texts[0] if len(texts) == 1 else f"{texts[0]}-{texts[-1]}"


def took(seconds: float) -> str:
    return f"{seconds:.0f} s"


def machine() -> dict[str, Any]:
    """What a reader must know to compare times."""
    names = re.findall(r"(?m)^model name\s*:\s*(.+)$", cpu_info())
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "bitloft": bitloft.__version__,
    }


def cpu_info() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.exists() else ""


def report(found: Result, ledger: Ledger, result: Table) -> str:
    """The HTML page."""
    about = machine()
    total = sum(ledger.seconds.values())
    sections = [
        Section("Result", (result,)),
        Section("What is stored", (sizes(found),)),
        Section("What it does to held-out text", (qualities(found),)),
        Section("Training", (courses(found),)),
        Section("Answers from one batch", (answers(found["answers"]["rows"]),)),
        Section("The server", (server_text(found["server"]), answers(found["server"]["answers"]))),
        Section("Steps", (steps(ledger), f"{total:.0f} s in all.")),
        Section("Machine", (Table(("", ""), tuple((key, str(value)) for key, value in about.items())),)),
    ]
    return page("bitloft: a low-bit LoRA's life, once around", sections)


def sizes(found: Result) -> Any:
    embedding = found["bases"][TRAINED_ON]["embedding_bytes"]
    stored = {"16-bit": found["model"]["stored_bytes"]} | {n: b["stored_bytes"] for n, b in found["bases"].items()}
    parts = {
        name: {"matrices and start": ((total - embedding) / 1e6, 0.0), "embeddings, 16 bit": (embedding / 1e6, 0.0)}
        for name, total in stored.items()
    }
    return bars(parts, unit="MB", caption="Bytes on disk; the embeddings are the same in each")


def qualities(found: Result) -> Any:
    names = {"16-bit": "16-bit model", TRAINED_ON: f"{TRAINED_ON} base", "trained": "+ adapter as trained"}
    names |= {"waterfill": "+ adapter packed (waterfill)", "loraquant": "+ adapter packed (LoRAQuant 2@0.8)"}
    groups = {
        skill: {
            label: (float(found["eval"][name][skill]["loss"]), float(found["eval"][name][skill]["stderr"] or 0.0))
            for name, label in names.items()
        }
        for skill in found["data"]
    }
    return bars(groups, unit="loss, nats per token", caption="Held-out loss with its standard error; lower is better")


def courses(found: Result) -> Any:
    series = {skill: [(float(h[0]), float(h[1])) for h in r["history"]] for skill, r in found["train"].items()}
    return lines(series, x="step", y="training loss, nats per token", caption="Training loss of both adapters")


def answers(rows: list[Result]) -> Table:
    return Table(("prompt", "answered by", "answer"), tuple((r["prompt"], r["adapter"], r["answer"]) for r in rows))


def server_text(server: Result) -> str:
    first = server["first_token_seconds"]
    return (
        f"Asked through the openai client. Models: {', '.join(server['models'])}. Ready after "
        f"{server['ready_seconds']:.1f} s; first streamed token after {first:.2f} s; the stream "
        f"{'added up to' if server['stream_equal'] else 'differed from'} the whole answer; after SIGTERM it ended with "
        f"code {server['exit']}."
    )


def steps(ledger: Ledger) -> Table:
    rows = ((name, took(s), "kept" if name in ledger.kept else "run") for name, s in ledger.seconds.items())
    return Table(("step", "took", "this time"), tuple(rows))


def insert(readme: Path, markdown: str) -> None:
    """Put ``markdown`` between the markers of a README. Raises ValueError where it has none."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} needs {BEGIN} and {END} once each.")
    before, _, rest = text.partition(BEGIN)
    write(readme, f"{before}{BEGIN}\n{markdown}\n{END}{rest.partition(END)[2]}")


def markdown(result: Table, about: Mapping[str, Any], total: float) -> str:
    """The table for the README, with what was measured and where."""
    where = f"{about['processor']}, {about['cores']} cores: {total / 60:.1f} minutes in all"
    return f"{result.markdown()}\n\n{result.note} Measured by `make demo` on {where}."
