"""bitloft: the whole low-bit LoRA life, in bytes that exist.

Attributes load on first use (PEP 562), so ``import bitloft`` starts neither torch nor transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "Format": "bitloft.formats",
    "PackedTensor": "bitloft.packed",
    "quantize": "bitloft.quantize",
    "train": "bitloft.train",
    "compress": "bitloft.compress",
    "expand": "bitloft.compress",
    "rebase": "bitloft.rebase",
    "merge": "bitloft.merge",
    "convert": "bitloft.convert",
    "evaluate": "bitloft.evaluate",
    "judge": "bitloft.judge",
    "tune": "bitloft.tune",
    "sweep": "bitloft.sweep",
    "start_for": "bitloft.starts",
    "load": "bitloft.integrations.loading",
    "register": "bitloft.integrations",
}

__all__ = [
    "Format",
    "PackedTensor",
    "compress",
    "convert",
    "evaluate",
    "expand",
    "judge",
    "load",
    "merge",
    "quantize",
    "rebase",
    "register",
    "start_for",
    "sweep",
    "train",
    "tune",
]

if TYPE_CHECKING:
    from bitloft.compress import compress, expand
    from bitloft.convert import convert
    from bitloft.evaluate import evaluate
    from bitloft.formats import Format
    from bitloft.integrations import register
    from bitloft.integrations.loading import load
    from bitloft.judge import judge
    from bitloft.merge import merge
    from bitloft.packed import PackedTensor
    from bitloft.quantize import quantize
    from bitloft.rebase import rebase
    from bitloft.starts import start_for
    from bitloft.sweep import sweep
    from bitloft.train import train
    from bitloft.tune import tune


class _Package(ModuleType):
    """Keeps ``bitloft.quantize`` the function: importing the module of the same name would bind the module there."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitloft' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
