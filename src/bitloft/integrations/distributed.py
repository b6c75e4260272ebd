"""Training by several processes: who is first, who waits, and which tensors are shared out.

    DDP      every process has the whole model; gradients of the adapter are averaged
    FSDP2    every process has a part of each tensor, of packed codes too; a layer's are put together while it computes

Packed codes are plain int8 Parameters, so FSDP2 shares them out like any other: what travels is 2 to 4 bits a weight
where a dense model's are 16. Scales are buffers, which FSDP2 leaves whole in every process (a sixteenth to an eighth of
the codes' bytes). DDP must leave integers alone: they never change, and gloo cannot send int16.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bitloft.errors import OptionError


def processes() -> int:
    """How many processes a launcher (torchrun, accelerate launch) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """True in the process that writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def join() -> None:
    """Become one of the launcher's processes; nothing without a launcher."""
    if processes() > 1:
        PartialState(cpu=not torch.cuda.is_available())


def wait() -> None:
    """Go on when every process has come here."""
    if processes() > 1:
        PartialState().wait_for_everyone()


@contextmanager
def first_alone() -> Iterator[bool]:
    """The first process works inside, the others wait for it to be done; yields whether this is the first."""
    yield is_first()
    wait()


def leave_out_packed(model: nn.Module) -> None:
    """Tell DDP which tensors it need not compare and broadcast: integers, which nobody trains."""
    named = [*model.named_parameters(), *model.named_buffers()]
    left = {name for name, tensor in named if not tensor.is_floating_point()}
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left)


def shard(model: Any) -> None:
    """Share out the parameters, layer by layer, in place (FSDP2); codes must be in the stored order.

    Raises OptionError for one process alone, and for a model whose class names no blocks.
    """
    if processes() < 2:
        raise OptionError("shard shares a model out among processes, and this is one alone; start it with torchrun.")
    kinds = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise OptionError(
            f"{type(model.get_base_model()).__name__} names no blocks that could be shared out; leave shard."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (processes(),))
    model.to(device)  # buffers stay where they are when parameters are shared out
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU; of a shared one all of it (every process must ask)."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().cpu().contiguous()


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor shared out as ``other`` is."""
    if not isinstance(other, DTensor) or tensor.dim() == 0:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def gather(model: nn.Module) -> None:
    """Make every trained parameter whole again, in place: the model is then for saving only."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad and isinstance(parameter.data, DTensor):
                module._parameters[name] = nn.Parameter(whole(parameter))
