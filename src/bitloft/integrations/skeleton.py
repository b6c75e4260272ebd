"""A model without values: built from the config on the meta device, it says what the checkpoint's tensors are for.

    checkpoint tensors --(transformers' own renamings and conversions)--> dense tensors --> packed tensors | copies

Names, shapes, ties and the choice of modules come from the model class, as they do when transformers loads the model;
no value is read. For an architecture that transformers does not have, names and shapes decide (``Unknown``). The
alternative, rules over checkpoint names for every model, would be a second, worse copy of what transformers knows.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from bitloft.errors import CheckpointError
from bitloft.float8 import Stored
from bitloft.integrations.source import Held, Source
from bitloft.modules.select import HEADS
from bitloft.shards import NAMES, Spec

# names that mark a matrix which is not a linear layer, or one that is better left alone
UNPACKED = re.compile(r"embed|wte|wpe|norm|(^|\.)ln|head|score|classifier|shared|router|\.gate\.", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """Checkpoint tensors that are read together, and the model's dense tensors that they give."""

    sources: tuple[str, ...]
    targets: dict[str, Spec]
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()

    def read(self, tensors: Mapping[str, Stored], model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """The dense tensors by model name; one stored tensor is read unless a conversion needs more at once."""
        if self.converter is None:
            for target in self.targets:
                yield target, tensors[self.sources[0]].read()
            return
        values = [tensors[name].read() for name in self.sources]
        yield from _converted(self, values, model).items()


@dataclass
class Skeleton:
    """``model`` on the meta device, what to read for it, and the checkpoint tensors that it has no place for."""

    model: PreTrainedModel
    tensors: dict[str, Stored]
    readings: list[Reading]
    dropped: dict[str, str] = field(default_factory=dict)
    known: bool = True

    def dense(self) -> dict[str, Spec]:
        """The model's tensors as the checkpoint gives them, in the model's order."""
        given = {name: spec for reading in self.readings for name, spec in reading.targets.items()}
        ordered = [name for name in self.model.state_dict() if name in given]
        return {name: given[name] for name in ordered}


def open_skeleton(source: Source) -> Skeleton:
    """The skeleton of a source, its checkpoint checked against it; GGUF weights are in memory, others stay in files.

    Raises CheckpointError for tensors that are missing or have another shape than the config says.
    """
    if source.gguf:
        loaded = source.load()
        state: dict[str, Stored] = {name: Held(tensor) for name, tensor in loaded.state_dict().items()}
        skeleton = Skeleton(loaded.to("meta"), state, [])
    else:
        state = source.tensors()
        model = _empty_model(source)
        skeleton = Skeleton(model or Unknown(state), state, [], known=model is not None)
    _map_names(skeleton)
    _settle_ties(skeleton)
    _check(skeleton)
    return skeleton


def _empty_model(source: Source) -> PreTrainedModel | None:
    """The class that the config names, on the meta device, with the folder's generation config; None if unknown."""
    raw = source.config()
    kind = getattr(transformers, (raw.get("architectures") or ["?"])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)) or raw.get("auto_map"):
        return None
    config = AutoConfig.from_pretrained(source.folder)
    if hasattr(config, "quantization_config"):  # fp8: what is built here is the 16-bit model that it stands for
        del config.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    if model.can_generate():
        found = {"config_file_name": "config.json", "_from_model_config": True}
        at = transformers.GenerationConfig.from_pretrained
        try:
            model.generation_config = at(source.folder)
        except OSError:
            model.generation_config = at(source.folder, **found)
    return model


class Unknown(PreTrainedModel):
    """A stand-in for an architecture that transformers does not have: modules named as the checkpoint's tensors are.

    A matrix named ``*.weight`` is a linear layer unless its name speaks of an embedding, a norm or a head.
    """

    config_class = PreTrainedConfig

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        super().__init__(PreTrainedConfig())
        for name, stored in tensors.items():
            path, _, leaf = name.rpartition(".")
            parent: nn.Module = self
            owner: nn.Module = self
            for step in path.split(".") if path else ():
                parent, owner = owner, owner._modules.setdefault(step, NamedTensors()) or owner
            shape = stored.spec.shape
            matrix = leaf == "weight" and len(shape) == 2 and not UNPACKED.search(name)
            if matrix and owner._parameters.keys() <= {"bias"}:
                with torch.device("meta"):
                    owner = nn.Linear(shape[1], shape[0], bias=f"{path}.bias" in tensors)
                parent._modules[path.rpartition(".")[2]] = owner
            elif leaf not in owner._parameters:
                empty = torch.empty(shape, device="meta")
                owner.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        self.post_init()


class NamedTensors(nn.Module):
    """Tensors of an unknown architecture that are not a linear layer's."""


def _map_names(skeleton: Skeleton) -> None:
    """Fill in the readings, by the steps that transformers takes when it loads a checkpoint."""
    model, state = skeleton.model, skeleton.model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, list[tuple[str, str | None]]] = {}
    prefix = model.base_model_prefix or None
    for name in sorted(skeleton.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            groups.setdefault(target, []).append((name, pattern))
        else:
            skeleton.dropped[name] = f"no part of {type(model).__name__}; it is not written"
    for target, members in groups.items():
        sources, patterns = tuple(name for name, _ in members), tuple(p for _, p in members if p)
        if patterns:
            reading = Reading(sources, {}, by_pattern[patterns[0]], patterns)
            specs = [skeleton.tensors[name].spec for name in sources]
            empty = [_meta(spec) for spec in specs]
            given = _converted(Reading(sources, {target: specs[0]}, reading.converter, patterns), empty, model)
            reading.targets.update({name: Spec(specs[0].dtype, tuple(t.shape)) for name, t in given.items()})
        elif len(sources) > 1:
            raise CheckpointError(f"the checkpoint gives {target} twice, as {sources[0]} and as {sources[1]}.")
        else:
            reading = Reading(sources, {target: skeleton.tensors[sources[0]].spec})
        skeleton.readings.append(reading)


def _meta(spec: Spec) -> Tensor:
    return torch.empty(spec.shape, device="meta")


def _converted(reading: Reading, values: list[Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """What transformers' conversion makes of checkpoint tensors, by model name."""
    converter, first = deepcopy(reading.converter), next(iter(reading.targets))
    if converter is None:
        raise CheckpointError(f"{first} has no conversion; this is a bug of bitloft.")
    for name, pattern, value in zip(reading.sources, reading.patterns, values, strict=True):
        converter.add_tensor(first, name, pattern, value)
    made = converter.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _settle_ties(skeleton: Skeleton) -> None:
    """Of tensors that the model ties keep one, under the name that the model saves it by.

    A checkpoint may hold the other name only, or both; where the two differ they are not tied, as in transformers.
    """
    found = {name: reading for reading in skeleton.readings for name in reading.targets}
    for target, kept in getattr(skeleton.model, "all_tied_weights_keys", {}).items():
        if target not in found or found[target].converter is not None:
            continue
        if kept not in found:
            spec = found[target].targets.pop(target)
            found[target].targets[kept] = spec
            found[kept] = found.pop(target)
        elif _equal(skeleton.tensors[found[target].sources[0]], skeleton.tensors[found[kept].sources[0]]):
            skeleton.readings.remove(found.pop(target))


def _equal(one: Stored, other: Stored) -> bool:
    if one.spec != other.spec:
        return False
    return all(torch.equal(a.view(-1), b.view(-1)) for a, b in zip(one.chunks(), other.chunks(), strict=True))


def _check(skeleton: Skeleton) -> None:
    """Raise CheckpointError where the checkpoint lacks a parameter of the model, or has it in another shape."""
    model, kind = skeleton.model, type(skeleton.model).__name__
    found = {name: (spec, reading) for reading in skeleton.readings for name, spec in reading.targets.items()}
    state = model.state_dict()
    for name, (spec, reading) in found.items():
        if name in state and tuple(state[name].shape) != spec.shape:
            raise CheckpointError(
                f"tensor {reading.sources[0]} has shape {list(spec.shape)}, where {kind} with this config has "
                f"{list(state[name].shape)}; index, shard or config belong to another model."
            )
    tied = getattr(model, "all_tied_weights_keys", {})
    wanted = {name for name, _ in model.named_parameters()} - tied.keys()
    missing = [name for name in state if name in wanted and name not in found and not _made_fresh(model, name)]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {missing[0]} ({len(missing)} tensors of {kind} are missing); a shard may be absent."
        )


def _made_fresh(model: PreTrainedModel, name: str) -> bool:
    """True for a tensor that checkpoints of a base model lack: a task head's, a pooler's, or one the class names."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    head = model.get_output_embeddings()
    outside = hasattr(model, model.base_model_prefix) and not name.startswith(f"{model.base_model_prefix}.")
    outside = outside and (head is None or model.get_submodule(name.rpartition(".")[0]) is not head)
    return outside or any(part in HEADS for part in name.split(".")) or any(re.search(p, name) for p in patterns)


def check_names(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise CheckpointError where transformers, when it loads these names, would take one for another tensor."""
    state, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for name in names if mapping else ():
        found, _ = rename_source_key(name, renamings, converters, model.base_model_prefix or None, state)
        if found != name and found in state and name in state:
            raise CheckpointError(
                f"the packed tensor {name} would be loaded as {found} by this version of transformers; skip its module."
            )


def specs_of(tensors: Mapping[str, Any]) -> dict[str, Spec]:
    """Dtypes and shapes of a state dict."""
    return {name: Spec(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
