"""fp8 checkpoints: weights of 8-bit floats with scales beside them, read as the 16-bit model that they stand for.

    value[i, j] = fp8[i, j] * scale[i // block_rows, j // block_columns]

The scale is one number, one per row, or one per block (``weight_scale_inv`` of DeepSeek and of transformers' fp8,
``weight_scale`` of compressed-tensors and others: both are multiplied). Without a scale fp8 is refused: its numbers
alone have lost their size, and to read them as they are would give a model that is silently wrong.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor

from bitloft.errors import CheckpointError
from bitloft.shards import Spec

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".output_scale")
BLOCK = (128, 128)  # where the config does not say


@runtime_checkable
class Stored(Protocol):
    """A tensor that can be read: what it is, its values, or its bytes piece by piece."""

    @property
    def spec(self) -> Spec: ...

    def read(self) -> Shaped[Tensor, "*shape"]: ...

    def chunks(self) -> Iterator[Shaped[Tensor, "*piece"]]: ...


@dataclass(frozen=True)
class Scaled:
    """An fp8 tensor and its scale. ``read`` gives float32, the exact product; a copy is stored in bfloat16."""

    name: str
    weight: Stored
    scale: Stored
    block: tuple[int, int]

    @property
    def spec(self) -> Spec:
        return Spec("BF16", self.weight.spec.shape)

    def read(self) -> Float[Tensor, "*shape"]:
        weight, scale = self.weight.read().float(), self.scale.read().float()
        if scale.numel() == 1:
            return weight * scale.reshape(())
        if scale.dim() == 1 and len(scale) == weight.shape[0]:
            scale = scale.unsqueeze(1)
        if scale.shape == (weight.shape[0], 1):
            return weight * scale
        rows, columns = self.block
        expected = tuple(-(-n // b) for n, b in zip(weight.shape, self.block, strict=True))
        if tuple(scale.shape) != expected:
            raise CheckpointError(
                f"tensor {self.name} is fp8 {list(weight.shape)} in blocks of {list(self.block)}, but its scale has "
                f"shape {list(scale.shape)} and not {list(expected)}."
            )
        for i in range(scale.shape[0]):  # a row of blocks at a time: no scale as large as the weight is ever made
            band = weight[i * rows : (i + 1) * rows]
            band *= scale[i].repeat_interleave(columns)[: weight.shape[1]]
        return weight

    def chunks(self) -> Iterator[Shaped[Tensor, "*piece"]]:
        yield self.read().bfloat16()


def with_scales(entries: Mapping[str, Stored], block: tuple[int, int] = BLOCK) -> dict[str, Stored]:
    """The tensors of a checkpoint with every fp8 weight joined to its scale; scales no longer appear by themselves.

    Raises CheckpointError naming an fp8 tensor that has no scale.
    """
    found: dict[str, Stored] = {}
    used: set[str] = set()
    for name, entry in entries.items():
        if entry.spec.dtype not in FLOAT8:
            found[name] = entry
            continue
        scale = next((name + end for end in _SCALES if name + end in entries), None)
        if scale is None:
            raise CheckpointError(
                f"tensor {name} is fp8 and no scale lies beside it ({name}_scale_inv); its values cannot be known, "
                "convert the model to 16 bit first."
            )
        found[name] = Scaled(name, entry, entries[scale], block)
        used.add(scale)
    if not used:
        return found
    return {name: entry for name, entry in found.items() if name not in used and not name.endswith(_ACTIVATIONS)}


def is_float8(entries: Mapping[str, Stored]) -> bool:
    """True where any weight is an 8-bit float."""
    return any(entry.spec.dtype in FLOAT8 for entry in entries.values())
