"""The dense model to quantize: a hub name, a safetensors folder (or its URL) or a GGUF file, never a pickle.

Tensors of a folder are read one at a time, by name (``shards.py``); a GGUF file is converted whole by transformers,
since its tensors have other names, orders and number formats than the model's.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Shaped
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bitloft.checkpoint import fingerprint, ignored_pickles, read_json, sha256, weight_files
from bitloft.errors import CheckpointError
from bitloft.float8 import BLOCK, Stored, is_float8, with_scales
from bitloft.integrations.loading import model_class, quiet_loading
from bitloft.integrations.remote import fetch_small, fetch_whole, is_url, remote_entries, remote_fingerprint
from bitloft.shards import NAMES, Spec, open_shards, shard_files

# what a hub model is made of: weights, configs and tokenizer, but not the same weights in other layouts
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Source:
    """Where a dense model comes from: files in ``folder``, one of them ``gguf`` where it is a GGUF file.

    ``commit`` is the hub's, None for local files; ``url`` is where the weights of a folder lie in storage, of which
    ``folder`` then holds the small files and headers (``remote.py``). ``ignored`` are pickles beside the weights, never
    opened.
    """

    name: str
    folder: str
    gguf: str | None = None
    commit: str | None = None
    ignored: tuple[str, ...] = ()
    url: str | None = None

    def fingerprint(self) -> str:
        """Identity of the dense model: its weight files' names and contents, or for a hub name its commit."""
        if self.gguf:
            return sha256(Path(self.folder) / self.gguf)
        if self.commit:
            return hashlib.sha256(f"{self.name}@{self.commit}".encode()).hexdigest()
        if self.url:
            return remote_fingerprint(Path(self.folder), self.url)
        return fingerprint(shard_files(Path(self.folder)))

    def files(self) -> list[str] | None:
        """The weight files of a folder; None for a GGUF file."""
        return None if self.gguf else [str(file) for file in shard_files(Path(self.folder))]

    def config(self) -> dict[str, Any]:
        """config.json as it is. Raises CheckpointError where it is none."""
        found = read_json(Path(self.folder) / "config.json")
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.folder}/config.json does not hold a JSON object; it is damaged.")
        return found

    def tensors(self) -> dict[str, Stored]:
        """Every tensor of the folder by its name there; fp8 weights are joined to their scales.

        Raises CheckpointError for damaged shards, and for a model that is quantized already.
        """
        folder = Path(self.folder)
        entries = remote_entries(folder, self.url) if self.url else open_shards(folder)
        settings = self.config().get("quantization_config")
        if settings is not None and not is_float8(entries):
            raise CheckpointError(f"{self.name} is quantized already; quantize the 16-bit model that it was made of.")
        return with_scales(entries, _block(settings))

    def whole(self) -> str:
        """The folder, with the weights of a URL fetched into it, for a reader that wants files."""
        if self.url:
            fetch_whole(Path(self.folder), self.url)
        return self.folder

    def load(self) -> PreTrainedModel:
        """The whole dense model, in the dtype of its file (GGUF: float16), on CPU."""
        with quiet_loading():
            if self.gguf:
                loaded = AutoModelForCausalLM.from_pretrained(self.folder, gguf_file=self.gguf, dtype=torch.float16)
                return _without_gguf(loaded)
            if self.config().get("quantization_config") is not None:
                raise CheckpointError(
                    f"{self.name} is quantized already; quantize the 16-bit model that it was made of."
                )
            kind = model_class(self.config(), self.name)
            model: PreTrainedModel = kind.from_pretrained(self.whole(), dtype="auto", use_safetensors=True)
            return model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None for a model that has none (some encoder-decoders name their symbols in the config)."""
        if self.gguf:
            return AutoTokenizer.from_pretrained(self.folder, gguf_file=self.gguf)
        if not any(Path(self.folder).glob("*token*")) and not any(Path(self.folder).glob("vocab*")):
            return None
        return AutoTokenizer.from_pretrained(self.folder)


@dataclass(frozen=True)
class Held:
    """A tensor in memory, read like one in a file."""

    tensor: Shaped[Tensor, "*shape"]

    @property
    def spec(self) -> Spec:
        return Spec(NAMES[self.tensor.dtype], tuple(self.tensor.shape))

    def read(self) -> Shaped[Tensor, "*shape"]:
        return self.tensor

    def chunks(self) -> Iterator[Shaped[Tensor, "*piece"]]:
        yield self.tensor


def open_source(model: str) -> Source:
    """Find a model; hub names are downloaded, URLs read as needed. Raises CheckpointError naming what is missing."""
    if is_url(model):
        return replace(_folder(model.rstrip("/").rpartition("/")[2], fetch_small(model)), url=model)
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{model} is a file but not a GGUF one; give a model folder, a .gguf file or a hub name."
            )
        return Source(path.stem, str(path.parent), gguf=path.name)
    if path.is_dir():
        return _folder(path.resolve().name, path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} does not exist; give a model folder, a .gguf file or a hub name.")
    try:
        config = AutoConfig.from_pretrained(model)
        folder = Path(snapshot_download(model, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model} is neither a local model nor a reachable hub name ({first}).") from error
    return _folder(model, folder, getattr(config, "_commit_hash", None) or folder.name)


def _folder(name: str, folder: Path, commit: str | None = None) -> Source:
    weight_files(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds weights but no config.json; give a whole transformers folder.")
    return Source(name, str(folder), commit=commit, ignored=tuple(ignored_pickles(folder)))


def _block(settings: Any) -> tuple[int, int]:
    """The block that shares an fp8 scale."""
    found = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    return (int(found[0]), int(found[1])) if isinstance(found, list) and len(found) == 2 else BLOCK


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
