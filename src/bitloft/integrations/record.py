"""What a base directory says of itself without a model being made: fingerprint, source, options, dtype, tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bitloft.checkpoint import MANIFEST, fingerprint, read_json, read_manifest, weight_files
from bitloft.errors import CheckpointError
from bitloft.formats import Format
from bitloft.options import QuantizeOptions
from bitloft.rules import StoredModule

REPORT = "bitloft_report.json"


@dataclass(frozen=True)
class BaseRecord:
    """What identifies a packed base. ``fingerprint`` covers its weight files, start included; ``source`` the model that
    was quantized (None where the directory was saved without a manifest)."""

    directory: Path
    fingerprint: str
    source: str | None
    options: dict[str, Any]

    @property
    def bits(self) -> int:
        """Bits of a code of the narrowest packed module."""
        config = _quantization_config(self.directory)
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()}
        options = QuantizeOptions(**given)
        stored = [StoredModule.read(entry, options, name) for name, entry in (config.get("modules") or {}).items()]
        return min(Format.parse(text).bits for text in [m.format for m in stored] or [options.format])

    @property
    def source_name(self) -> str | None:
        """The hub name, folder or file name of the model that was quantized, None where no report says it."""
        report = self.directory / REPORT
        name = read_json(report).get("source") if report.is_file() else None
        return name if isinstance(name, str) else None


def base_record(directory: Path | str, *, verify: bool = False) -> BaseRecord:
    """Identify a base directory from its manifest (checked against every file with ``verify``), or from its weights.

    Raises CheckpointError where the directory is not a bitloft base or is damaged.
    """
    directory = Path(directory)
    options = _quantization_config(directory)["options"]
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory, "base", verify=verify)
        return BaseRecord(directory, manifest["fingerprint"], manifest["source"], options)
    return BaseRecord(directory, fingerprint(weight_files(directory)), None, options)


def _quantization_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a base made by `bitloft quantize`.")
    config = read_json(directory / "config.json").get("quantization_config") or {}
    if config.get("quant_method") != "bitloft" or not isinstance(config.get("options"), dict):
        raise CheckpointError(f"{directory} is not a bitloft base; make one with `bitloft quantize MODEL --out DIR`.")
    return dict(config)


def stored_dtype(directory: Path | str) -> torch.dtype:
    """The dtype that a model folder's config gives for what is not packed; float32 where it names none."""
    dtype = getattr(torch, str(read_json(Path(directory) / "config.json").get("dtype")), torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_tokenizer(directory: Path | str) -> Any:
    """The tokenizer in a base directory. Raises CheckpointError where there is none."""
    directory = Path(directory)
    if not (directory / "tokenizer_config.json").exists():
        raise CheckpointError(f"{directory} holds no tokenizer (tokenizer_config.json); text cannot be encoded.")
    return AutoTokenizer.from_pretrained(directory)
