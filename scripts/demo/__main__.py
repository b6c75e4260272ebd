"""`make demo`, or `python -m scripts.demo`: the steps in order, a table, demo/report.html and demo/results.json."""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

# before transformers is imported: the demo says what it does itself
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from bitloft.errors import BitloftError
from bitloft.report import write
from scripts.demo import outcome
from scripts.demo.lap import Lap
from scripts.demo.ledger import Ledger
from scripts.demo.settings import FULL, SMOKE

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    asked = parse(arguments)
    directory: Path = asked.dir
    began = time.perf_counter()
    # peft imports bitsandbytes where it is installed, which warns that a kernel of its own is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    ledger = Ledger(directory, say=lambda text: print(text, flush=True))
    print(f"bitloft's demo: results go to {directory}/, steps that are there already are kept.")
    try:
        found = Lap(directory, SMOKE if asked.smoke else FULL, ledger, asked.model).run()
    except BitloftError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    about, total = outcome.machine(), sum(ledger.seconds.values())
    table = outcome.table(found, ledger.seconds)
    results = {"found": found, "seconds": ledger.seconds, "total_seconds": total, "machine": about}
    write(directory / "results.json", json.dumps(results, indent=1, sort_keys=True) + "\n")
    write(directory / "report.html", outcome.report(found, ledger, table))
    print(f"\n{table.text()}\n\n{table.note}\n")
    if asked.readme:
        outcome.insert(ROOT / "README.md", outcome.markdown(table, about, total))
        print("README.md has this table now.")
    print(f"{time.perf_counter() - began:.0f} s this time, {total:.0f} s for every step: {directory / 'report.html'}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--model", help="a transformers folder in place of SmolLM2-135M-Instruct")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: that it runs, not what it finds")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md, between its markers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
