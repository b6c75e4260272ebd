"""The dense model to quantize: a hub name, a safetensors folder or a GGUF file, never a pickle."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bitloft.checkpoint import fingerprint, ignored_pickles, sha256, weight_files
from bitloft.errors import CheckpointError
from bitloft.integrations.loading import model_class, quiet_loading


@dataclass(frozen=True)
class Source:
    """Where a dense model comes from. ``folder`` is local or a hub name; ``gguf`` a file name inside it."""

    name: str
    folder: str
    gguf: str | None
    tokenizer: Any
    ignored: tuple[str, ...]

    def load(self) -> PreTrainedModel:
        """The dense model, in the dtype of its file (GGUF: float16), on CPU."""
        with quiet_loading():
            if self.gguf:
                loaded = AutoModelForCausalLM.from_pretrained(self.folder, gguf_file=self.gguf, dtype=torch.float16)
                return _without_gguf(loaded)
            config = AutoConfig.from_pretrained(self.folder)
            if getattr(config, "quantization_config", None) is not None:
                raise CheckpointError(
                    f"{self.name} is quantized already; quantize the 16-bit model that it was made of."
                )
            kind = model_class(config.to_dict(), self.name)
            model: PreTrainedModel = kind.from_pretrained(self.folder, dtype="auto", use_safetensors=True)
            return model

    def fingerprint(self) -> str:
        """Identity of the dense model: its weight files' names and contents, or for a hub name its commit."""
        if self.gguf:
            return sha256(Path(self.folder) / self.gguf)
        if Path(self.folder).is_dir():
            return fingerprint(weight_files(Path(self.folder)))
        config = AutoConfig.from_pretrained(self.folder)
        return hashlib.sha256(f"{self.folder}@{getattr(config, '_commit_hash', None)}".encode()).hexdigest()


def open_source(model: str) -> Source:
    """Find a model and its tokenizer. Raises CheckpointError naming what is missing."""
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{model} is a file but not a GGUF one; give a model folder, a .gguf file or a hub name."
            )
        return Source(path.stem, str(path.parent), path.name, _tokenizer(str(path.parent), path.name), ())
    if path.is_dir():
        weight_files(path)
        if not (path / "config.json").exists():
            raise CheckpointError(f"{model} holds weights but no config.json; give a whole transformers folder.")
        return Source(path.resolve().name, model, None, _tokenizer(model, None), tuple(ignored_pickles(path)))
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} does not exist; give a model folder, a .gguf file or a hub name.")
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model} is neither a local model nor a reachable hub name ({first}).") from error
    return Source(model, model, None, _tokenizer(model, None), ())


def _tokenizer(folder: str, gguf: str | None) -> Any:
    """The tokenizer, or None for a model that has none (some encoder-decoders name their symbols in the config)."""
    if gguf:
        return AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    if Path(folder).is_dir() and not any(Path(folder).glob("*token*")) and not any(Path(folder).glob("vocab*")):
        return None
    return AutoTokenizer.from_pretrained(folder)


def _without_gguf(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a fresh model: transformers refuses to save one that was read from GGUF."""
    settings = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    config = type(model.config).from_dict(settings)
    with torch.device("meta"):
        fresh: PreTrainedModel = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    for name, table in model.named_buffers():  # rotary tables are in no state dict and would stay on meta
        owner, _, leaf = name.rpartition(".")
        setattr(fresh.get_submodule(owner), leaf, table)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.config.dtype = torch.float16
    return fresh
