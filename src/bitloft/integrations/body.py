"""A dense model whose parts get their values when they are needed: read from the source's files, in float32.

Buffers that no file holds (rotary tables, position numbers) are real from the start; everything else is on the meta
device until ``fill`` reads it and after ``drop`` forgets it. The alternative, accelerate's disk offload, wants a copy
of the model in a format of its own first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitloft.errors import OptionError
from bitloft.integrations.skeleton import Reading, open_skeleton
from bitloft.integrations.source import Source


class Body:
    """The model of ``source``, in eval mode and without a cache. ``resident`` says that ``drop`` keeps values.

    Raises CheckpointError where files and config disagree, OptionError for an architecture that transformers does not
    have: it has no forward.
    """

    def __init__(self, source: Source) -> None:
        skeleton = open_skeleton(source)
        if not skeleton.known:
            raise OptionError(f"{source.name} is of no architecture that transformers knows; it cannot be run.")
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = type(skeleton.model)(skeleton.model.config).eval()
        for module in self.model.modules():  # an encoder-decoder's halves have configs of their own
            if isinstance(module, PreTrainedModel):
                module.config.use_cache = False
        self.resident = False
        self._tensors, self._shapes = skeleton.tensors, skeleton.model
        self._readings: dict[str, Reading] = {t: r for r in skeleton.readings for t in r.targets}

    def within(self, *modules: str) -> list[str]:
        """The tensors of some modules that the files hold."""
        prefixes = tuple(f"{module}." for module in modules)
        return [name for name in self._readings if name.startswith(prefixes)]

    def fill(self, names: Sequence[str]) -> None:
        """Read some tensors of the model."""
        wanted = set(names)
        for reading in {id(self._readings[name]): self._readings[name] for name in names}.values():
            for name, value in reading.read(self._tensors, self._shapes):
                if name in wanted:
                    self.put(name, value.float() if value.is_floating_point() else value)

    def fill_all_but(self, modules: Sequence[str]) -> None:
        """Read every tensor outside of ``modules``; what no file holds, such as a fresh head, becomes zero."""
        left = set(self.within(*modules))
        self.fill([name for name in self._readings if name not in left])
        self.model.tie_weights()
        prefixes = tuple(f"{module}." for module in modules)
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not name.startswith(prefixes or ("\0",)):
                self.put(name, torch.zeros(parameter.shape))

    def put(self, name: str, value: Tensor) -> None:
        """Give one tensor of the model its value."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def drop(self, module: str) -> None:
        """Forget the values of a module, unless the model is resident."""
        for name in () if self.resident else self.within(module):
            self.put(name, torch.empty_like(self._value(name), device="meta"))

    def stay(self) -> None:
        """Read everything, for good."""
        self.resident = True
        self.fill_all_but(())

    def _value(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        found: Any = module._parameters.get(leaf, module._buffers.get(leaf))
        value: Tensor = found
        return value
