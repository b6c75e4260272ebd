"""In which dtype a model computes, and why: chosen once, said in the report, never changed in silence."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from bitloft.errors import OptionError


@dataclass(frozen=True)
class Precision:
    """``bfloat16`` runs under autocast (weights and sums stay float32), ``float32`` without."""

    dtype: torch.dtype
    why: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_precision(asked: str, device: torch.device) -> Precision:
    """The precision for ``asked`` (float32, bfloat16 or auto) on ``device``. Raises OptionError for another word."""
    if asked in ("float32", "bfloat16"):
        return Precision(getattr(torch, asked), "asked for")
    if asked != "auto":
        raise OptionError(f"unknown dtype {asked!r}; use auto, float32 or bfloat16.")
    if computes_bfloat16(device):
        return Precision(torch.bfloat16, f"this {_processor(device)} multiplies in bfloat16")
    return Precision(torch.float32, f"this {_processor(device)} has no bfloat16 arithmetic")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions, so that autocast is a gain and not an emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _processor(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else "GPU"
