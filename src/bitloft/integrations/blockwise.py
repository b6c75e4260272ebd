"""A dense model of which one block is in memory at a time: what it costs to ask a teacher.

A block is a child of a ModuleList whose class the model lists in ``_no_split_modules``. Its weights are read from the
source's files when its forward begins and dropped when it ends; embeddings and final norm stay. Every forward reads the
whole model once, so batches should be large. A model that lists no such class is held whole, and ``held`` says so.
The alternative, accelerate's disk offload, wants a copy of the model in a format of its own first.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitloft.integrations.skeleton import Skeleton, open_skeleton
from bitloft.integrations.source import Source


@dataclass
class Blockwise:
    """``model`` is the dense model without its head and computes in float32; ``held`` says what of it is in memory."""

    model: nn.Module
    held: str

    @classmethod
    def open(cls, source: Source) -> "Blockwise":
        """Raises CheckpointError where the files do not fit the config."""
        skeleton = open_skeleton(source)
        with init_empty_weights(include_buffers=False):  # buffers that no file holds, such as rotary tables, are real
            model: PreTrainedModel = type(skeleton.model)(skeleton.model.config)
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        blocks = {path: block for path, block in blocks_of(model).items() if path.startswith(prefix)}
        given = {name for reading in skeleton.readings for name in reading.targets if name.startswith(prefix)}
        inside = {path: {name for name in given if name.startswith(f"{path}.")} for path in blocks}
        waiting = set[str]().union(*inside.values())
        _fill(model, skeleton, given - waiting)
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta and name.startswith(prefix) and name not in waiting:  # a pooler that no file holds
                _put(model, name, torch.zeros(parameter.shape))
        for path, block in blocks.items():
            _stream(model, block, skeleton, inside[path])
        held = f"one of {len(blocks)} blocks" if blocks else "the whole model (its class names no blocks)"
        return cls(model.base_model.eval(), held)


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The blocks of a model by path, in model order."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return {
        f"{path}.{name}" if path else name: child
        for path, parent in model.named_modules()
        if isinstance(parent, nn.ModuleList)
        for name, child in parent.named_children()
        if type(child).__name__ in kinds
    }


def _stream(model: PreTrainedModel, block: nn.Module, skeleton: Skeleton, names: set[str]) -> None:
    """Fill ``block`` before its forward and empty it after."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name in names}

    def fill(module: nn.Module, args: Any) -> None:
        _fill(model, skeleton, names)

    def empty(module: nn.Module, args: Any, output: Any) -> None:
        for name in names:
            _put(model, name, torch.empty(shapes[name], device="meta"))

    block.register_forward_pre_hook(fill)
    block.register_forward_hook(empty)


def _fill(model: PreTrainedModel, skeleton: Skeleton, names: Container[str]) -> None:
    for reading in skeleton.readings:
        if any(name in names for name in reading.targets):
            for name, tensor in reading.read(skeleton.tensors, skeleton.model):
                if name in names:
                    _put(model, name, tensor.float() if tensor.is_floating_point() else tensor)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or a buffer by its full name."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
