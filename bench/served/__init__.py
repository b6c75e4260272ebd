"""What the serving benchmarks share: their flags, many adapters made quickly, and PEFT doing the same requests."""

import argparse
import os
from pathlib import Path

import harness


def arguments(about: str | None) -> argparse.Namespace:
    """The given flags, --smollm2 (needed but for --smoke) and --work among them; torch's threads are set."""
    parser = harness.parser(about)
    parser.add_argument("--smollm2", type=Path, default=os.environ.get("BITLOFT_SMOLLM2"), help="folder of the model")
    parser.add_argument("--work", type=Path, default=None, help="where base and adapters are kept (default: nowhere)")
    given = parser.parse_args()
    if given.mode != "smoke" and given.smollm2 is None:
        parser.error("--smollm2 is needed (or BITLOFT_SMOLLM2)")
    harness.begin(given)
    return given
