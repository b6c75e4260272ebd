"""Any model that an adapter may have been trained on, ready to run: a packed base, a dense model, a bitsandbytes base.

bitsandbytes' own layers want its package and often a GPU, so a base of 4 bits (and GPTQ) is dequantized here, matrix by
matrix, into a dense model: the same numbers, at the size of the 16-bit model.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from bitloft.checkpoint import read_json
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.foreign import ForeignBase, open_foreign
from bitloft.integrations.loading import load, model_class, quiet_loading
from bitloft.integrations.record import BaseRecord, base_record, load_tokenizer
from bitloft.integrations.source import open_source
from bitloft.shards import open_shards

FOREIGN = ("bitsandbytes", "gptq")


class Opened(NamedTuple):
    """A model in eval mode, float32 on the CPU, its tokenizer (None where it has none), and its record if packed."""

    model: PreTrainedModel
    tokenizer: Any
    record: BaseRecord | None = None


def open_model(where: str | Path, activations: str | None = None) -> Opened:
    """Open a packed base, a model folder, a hub name, a GGUF file, or a folder of bitsandbytes 4 bit or GPTQ.

    ``activations`` rounds what packed layers multiply (``load``). Raises CheckpointError where it is none of them or
    damaged, OptionError for ``activations`` of a model that is not packed.
    """
    method = quantized_by(Path(where))
    if method == "bitloft":
        return Opened(load(where, activations=activations), _tokenizer(Path(where)), base_record(where))
    if activations is not None:
        raise OptionError(f"activations {activations} are for packed layers; {where} is no packed base.")
    if method in FOREIGN:
        return Opened(_dequantized(Path(where), open_foreign(where)).eval(), _tokenizer(Path(where)))
    source = open_source(str(where))
    return Opened(source.load().float().eval(), source.tokenizer)


def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder) if (folder / "tokenizer_config.json").exists() else None


def quantized_by(directory: Path) -> str | None:
    """The quantization method that a folder's config names, None where there is no config or no method."""
    config = directory / "config.json"
    settings = (read_json(config).get("quantization_config") or {}) if config.is_file() else {}
    method = settings.get("quant_method", "bitsandbytes" if settings.get("load_in_4bit") else None)
    return method if isinstance(method, str) else None


def _dequantized(folder: Path, foreign: ForeignBase) -> PreTrainedModel:
    """The dense model, float32. Raises CheckpointError where a tensor is left over or missing."""
    prefixes = tuple(f"{name}." for name in foreign.matrices)
    entries = open_shards(folder)
    state = {name: entry.read() for name, entry in entries.items() if not name.startswith(prefixes)}
    state |= {name: entries[name].read() for name in entries if name.endswith(".bias")}
    state |= {f"{name}.weight": values for name, values in foreign}
    settings = AutoConfig.from_pretrained(folder).to_dict()
    settings.pop("quantization_config", None)
    kind = model_class(read_json(folder / "config.json"), str(folder))
    with quiet_loading():
        model, found = kind.from_pretrained(
            None,
            config=kind.config_class.from_dict(settings),
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]}; the base is damaged.")
    opened: PreTrainedModel = model
    return opened
