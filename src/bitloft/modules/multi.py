"""One base, many adapters: rows of different adapters in one forward.

For every adapted ``nn.Linear`` (QuantLinear is one) and every adapter in the batch

    y[rows] += sum over blocks of (x[rows] @ decode(a).T) @ decode(bt)      a [k, in], bt [k, out], scaling folded in

in the dtype of ``x``. Adapters stay packed in memory; factors are decoded for the call and dropped.

The bank adds through forward hooks. The alternative, wrapper modules as PEFT has them, renames every adapted weight in
``state_dict`` and hides QuantLinear from code that asks for the type; a removed hook leaves the model as it was. Which
rows belong to whom travels in a context variable, because models do not hand unknown keyword arguments down to their
linears; it also keeps two threads that use one model apart.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitloft.adapters import Adapter, PackedAdapter
from bitloft.errors import AdapterError
from bitloft.kernels.ops import decode
from bitloft.packed import PackedTensor

BASE = "__base__"  # PEFT's spelling of "no adapter" in adapter_names

Factor = PackedTensor | Tensor  # [k, width]
Block = tuple[Factor, Factor]  # a [k, in], bt [k, out]
Index = slice | Tensor


@dataclass(frozen=True)
class _Plan:
    """Which rows of a batch belong to which adapter: one list of (adapter, rows) for each batch size that may occur."""

    segments: Mapping[int, tuple[tuple[str, Index], ...]]


_ACTIVE: ContextVar[Mapping[int, _Plan]] = ContextVar("bitloft_rows", default=MappingProxyType({}))  # by id(bank)


class AdapterBank:
    """The adapters attached to one model. Without ``rows`` the model is its base, whatever is attached."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names: dict[str, int] = {}  # adapter -> stored bytes
        self._hooks: dict[str, _Hook] = {}  # module -> its hook, present while an adapter touches the module

    @property
    def names(self) -> tuple[str, ...]:
        """The attached adapters, in order of attachment."""
        return tuple(self._names)

    def nbytes(self, name: str) -> int:
        """Bytes of the factors that adapter ``name`` keeps in memory."""
        return self._names[self._known(name)]

    def attach(self, name: str, adapter: PackedAdapter | Adapter) -> None:
        """Make ``adapter`` available to ``rows`` as ``name``; a plain one keeps its float factors as they are.

        Raises AdapterError, and attaches nothing, for a name in use, a module that the model lacks or that has other
        widths or is no linear layer, and for factors that hold NaN or infinity.
        """
        if name == BASE or name in self._names:
            raise AdapterError(f"an adapter cannot be attached as {name!r}: the name is in use; choose another.")
        blocks = _blocks(adapter)
        if not blocks:
            raise AdapterError(f"adapter {name!r} adapts no module; there is nothing to attach.")
        for module, (widths, pairs) in blocks.items():
            _check(name, module, self._linear(name, module, widths), pairs)
        for module, (_, pairs) in blocks.items():
            if not pairs:  # every component of this module was dropped
                continue
            linear = self.model.get_submodule(module)
            if module not in self._hooks:
                self._hooks[module] = _Hook(self, module, linear)
            self._hooks[module].blocks[name] = [(_to(a, linear), _to(bt, linear)) for a, bt in pairs]
        self._names[name] = sum(_nbytes(f) for _, pairs in blocks.values() for pair in pairs for f in pair)

    def detach(self, name: str) -> None:
        """Forget adapter ``name``; a module that no adapter touches any more loses its hook."""
        self._known(name)
        for module, hook in list(self._hooks.items()):
            hook.blocks.pop(name, None)
            if not hook.blocks:
                hook.handle.remove()
                del self._hooks[module]
        del self._names[name]

    @contextmanager
    def rows(self, names: Sequence[str | None], expand: int = 1) -> Iterator[None]:
        """Forwards inside answer row i of the batch with adapter ``names[i]``; None or "__base__" is the base.

        ``expand`` = k allows batches of ``k * len(names)`` rows too, k neighbours each: beams or returned sequences,
        which an encoder sees once and a decoder k times. Raises AdapterError for a name that is not attached, in
        training mode, and in the forward if the batch has another number of rows.
        """
        token = _ACTIVE.set({**_ACTIVE.get(), id(self): self._plan(names, expand)})
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def _plan(self, names: Sequence[str | None], expand: int) -> _Plan:
        if isinstance(names, str):
            raise AdapterError(f"adapter_names is {names!r}; give a list with one name for each row of the batch.")
        if self.model.training:
            raise AdapterError("rows of different adapters are for inference; call model.eval() first.")
        for name in names:
            if name not in (None, BASE):
                self._known(name)
        plans = {}
        for repeat in {1, expand}:
            owners = [name for name in names for _ in range(repeat)]
            distinct = dict.fromkeys(name for name in owners if name is not None and name != BASE)
            rows = {name: [i for i, owner in enumerate(owners) if owner == name] for name in distinct}
            plans[len(owners)] = tuple((name, _index(found)) for name, found in rows.items())
        return _Plan(plans)

    def _known(self, name: str | None) -> str:
        if name is None or name not in self._names:
            attached = ", ".join(map(repr, self._names)) or "none"
            raise AdapterError(f"no adapter {name!r} is attached; attached: {attached}.")
        return name

    def _linear(self, name: str, module: str, widths: tuple[int, int]) -> nn.Linear:
        try:
            linear = self.model.get_submodule(module)
        except AttributeError:
            raise AdapterError(
                f"adapter {name!r} adapts module {module!r}, which the model does not have; it belongs to another base."
            ) from None
        if not isinstance(linear, nn.Linear):
            raise AdapterError(
                f"adapter {name!r} adapts module {module!r}, a {type(linear).__name__}; only linears can be mixed."
            )
        if widths != (linear.in_features, linear.out_features):
            raise AdapterError(
                f"adapter {name!r} has {widths[0]} -> {widths[1]} features at module {module!r}, the model has "
                f"{linear.in_features} -> {linear.out_features}; it belongs to another base."
            )
        return linear


class _Hook:
    """The forward hook of one module: it holds the factors of every adapter that touches the module."""

    def __init__(self, bank: AdapterBank, module: str, linear: nn.Module) -> None:
        self.bank, self.module = bank, module
        self.blocks: dict[str, list[Block]] = {}
        self.handle = linear.register_forward_hook(self, with_kwargs=True)

    def __call__(self, linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        plan = _ACTIVE.get().get(id(self.bank))
        if plan is None:
            return
        x: Tensor = args[0] if args else kwargs["input"]
        segments = plan.segments.get(x.shape[0])
        if segments is None:
            expected = " or ".join(str(n) for n in sorted(plan.segments))
            raise AdapterError(
                f"module {self.module!r} got a batch of {x.shape[0]} rows where adapter names were given for "
                f"{expected}; give one name for each row."
            )
        for name, index in segments:
            blocks = self.blocks.get(name)
            if blocks:  # an adapter need not touch every module
                if _device(blocks[0][0]) != x.device:  # the model was moved after attach
                    blocks = self.blocks[name] = [(_to(a, x), _to(bt, x)) for a, bt in blocks]
                # in place: the linear's output is fresh and its backward does not read it
                output[index] += _delta(x[index], blocks).to(output.dtype)


def _delta(x: Float[Tensor, "rows *length in"], blocks: list[Block]) -> Float[Tensor, "rows *length out"]:
    """sum over blocks of (x @ a.T) @ bt, in the dtype of x."""
    parts = [(x @ _values(a, x.dtype).T) @ _values(bt, x.dtype) for a, bt in blocks]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


class AdapterNames:
    """A model's ``forward`` or ``generate`` that takes ``adapter_names``; without it, the call is the model's own.

    An object with the method's signature, not a closure: ``generate`` inspects the signature of ``forward``, and
    ``copy.deepcopy`` of a model follows an object to the copied bank where a closure would call the old model.
    """

    def __init__(self, bank: AdapterBank, method: Callable[..., Any], expands: bool) -> None:
        self.bank, self.method, self.expands = bank, method, expands
        self.__signature__ = inspect.signature(method)

    def __call__(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return self.method(*args, **kwargs)
        expand = _expansion(self.bank.model, kwargs) if self.expands else 1
        with self.bank.rows(adapter_names, expand):
            return self.method(*args, **kwargs)


def install(model: nn.Module, bank: AdapterBank) -> None:
    """Keep ``bank`` as ``model.bitloft_bank`` and give ``model(...)`` and ``model.generate(...)`` ``adapter_names=``.

    The parameters, buffers and module names of the model do not change. Raises AdapterError for a bank of another
    model and for a model that has a bank already.
    """
    if bank.model is not model or hasattr(model, "bitloft_bank"):
        raise AdapterError("a model takes one bank, made for it; use model.bitloft_bank.")
    model.bitloft_bank = bank  # type: ignore[assignment]
    model.forward = AdapterNames(bank, model.forward, expands=False)
    if hasattr(model, "generate"):
        model.generate = AdapterNames(bank, model.generate, expands=True)  # type: ignore[assignment,arg-type]


def _expansion(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """Rows that ``generate`` makes of each prompt: the larger of its beams and its returned sequences."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    asked = (kwargs.get(key, getattr(config, key, None)) for key in ("num_beams", "num_return_sequences"))
    return max(1, *(count or 1 for count in asked))


def _blocks(adapter: PackedAdapter | Adapter) -> dict[str, tuple[tuple[int, int], list[Block]]]:
    """Module -> its (in, out) features and its blocks."""
    if isinstance(adapter, PackedAdapter):
        return {
            name: ((module.in_features, module.out_features), [(block.a, block.bt) for block in module.blocks])
            for name, module in adapter.modules.items()
        }
    return {
        pair.name: ((pair.a.shape[1], pair.b.shape[0]), [(pair.a, (pair.b * pair.scaling).T.contiguous())])
        for pair in adapter.pairs
    }


def _check(name: str, module: str, linear: nn.Linear, blocks: list[Block]) -> None:
    """Raise AdapterError unless every block fits the layer and is finite."""
    for a, bt in blocks:
        shapes = tuple(a.shape), tuple(bt.shape)
        if shapes != ((a.shape[0], linear.in_features), (a.shape[0], linear.out_features)):
            raise AdapterError(f"adapter {name!r} has factors of shapes {shapes} that do not fit module {module!r}.")
        if not all(bool(torch.isfinite(_values(f, torch.float32)).all()) for f in (a, bt)):
            raise AdapterError(f"adapter {name!r} holds NaN or infinity at module {module!r}; it is refused.")


def _values(factor: Factor, dtype: torch.dtype) -> Float[Tensor, "k width"]:
    return decode(factor, dtype) if isinstance(factor, PackedTensor) else factor.to(dtype)


def _device(factor: Factor) -> torch.device:
    return factor.codes.device if isinstance(factor, PackedTensor) else factor.device


def _to(factor: Factor, like: nn.Module | Tensor) -> Factor:
    device = like.device if isinstance(like, Tensor) else next(like.parameters()).device
    return factor if _device(factor) == device else factor.to(device)


def _nbytes(factor: Factor) -> int:
    return factor.nbytes


def _index(rows: list[int]) -> Index:
    """A slice where the rows are neighbours, so that no copy is gathered."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)
