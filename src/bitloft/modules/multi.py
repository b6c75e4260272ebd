"""One base, many adapters: rows of different adapters in one forward.

For every adapted ``nn.Linear`` (QuantLinear is one) and every adapter in the batch

    y[rows] += sum over blocks of (x[rows] @ decode(a).T) @ decode(bt)      a [k, in], bt [k, out], scaling folded in

summed in float32 (``kernels.lora``). Adapters stay packed in memory: native code reads their bytes, plain torch decodes
the factors for the call and drops them.

A QuantLinear asks the bank for the sum and adds it before it rounds its product; any other linear has rounded by then,
and gets it through a forward hook. The alternative, wrapper modules as PEFT has them, renames every adapted weight in
``state_dict`` and hides QuantLinear from code that asks for the type; what is removed here leaves the model as it was.
Which rows belong to whom travels in a context variable, because models do not hand unknown keyword arguments down to
their linears; it also keeps two threads that use one model apart.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitloft.adapters import Adapter, PackedAdapter
from bitloft.errors import AdapterError
from bitloft.kernels import cpu_lora
from bitloft.kernels.lora import Segment, Start, multi_lora
from bitloft.kernels.product import start_blocks
from bitloft.modules.described import Described
from bitloft.modules.held import Held, Views
from bitloft.modules.linear import QuantLinear

BASE = "__base__"  # PEFT's spelling of "no adapter" in adapter_names

IN_USE = 64  # adapters whose views are kept between forwards; the others are only their bytes


class _Batch:
    """One batch size of a plan: which rows take which adapter."""

    def __init__(self, size: int, segments: Sequence[tuple[Views, tuple[int, ...]]]) -> None:
        self.segments = segments
        self.rows = cpu_lora.Rows(size, [rows for _, rows in segments])
        self.touched = frozenset(module for views, _ in segments for module in views.blocks)
        self._jobs: dict[tuple[str, bool], tuple[Start | None, cpu_lora.Job]] = {}

    def job(self, module: str, features: int, start: Start | None = None) -> cpu_lora.Job:
        """The native side of one module, described once for the plan; a ``start`` is what all rows take."""
        found = self._jobs.get((module, start is None))
        if found is None or found[0] is not start:
            own = [views.native(module) for views, _ in self.segments]
            shared = None if start is None else start_blocks(start)
            found = start, cpu_lora.Job(features, self.rows, own, shared)
            self._jobs[module, start is None] = found
        return found[1]

    def on(self, module: str, device: torch.device) -> list[Segment]:
        """The same for ``kernels.lora``."""
        return [Segment(rows, tuple(views.on(module, device))) for views, rows in self.segments]


@dataclass(frozen=True)
class _Plan:
    """A batch for each number of rows that may occur, and what it was made of."""

    names: tuple[str | None, ...]
    expand: int
    batches: Mapping[int, _Batch]


_ACTIVE: ContextVar[Mapping[int, _Plan]] = ContextVar("bitloft_rows", default=MappingProxyType({}))  # by id(bank)


class AdapterBank:
    """The adapters attached to one model. Without ``rows`` the model is its base, whatever is attached.

    One thread may attach and detach while another computes, as long as what is detached is in no row of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: dict[str, Held] = {}
        self._recent: dict[str, None] = {}  # names whose views exist, the latest used last
        self._hooks: dict[str, _Hook] = {}  # by module path, present while an adapter touches the module
        self._last: _Plan | None = None  # the steps of a batch ask for the same rows again and again
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_lock": None}  # addresses and locks are of no use to a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def names(self) -> tuple[str, ...]:
        """The attached adapters, in order of attachment."""
        return tuple(self._held)

    def nbytes(self, name: str) -> int:
        """Bytes of the factors that adapter ``name`` keeps in memory."""
        return self._held[self._known(name)].nbytes

    def attach(self, name: str, adapter: PackedAdapter | Adapter) -> None:
        """Make ``adapter`` available to ``rows`` as ``name``; a plain one keeps its float factors as they are.

        Raises AdapterError, and attaches nothing, for a name in use, a module that the model lacks or that has other
        widths or is no linear layer, and for factors that hold NaN or infinity.
        """
        if name == BASE or name in self._held:
            raise AdapterError(f"an adapter cannot be attached as {name!r}: the name is in use; choose another.")
        held = Held(adapter)
        widths = held.widths()
        if not widths:
            raise AdapterError(f"adapter {name!r} adapts no module; there is nothing to attach.")
        sound = held.sound()
        for module, pair in widths.items():
            self._check(name, module, pair, None if sound else held)
        touched = held.shapes()
        held.release()
        with self._lock:
            for module in touched:
                if module not in self._hooks:
                    self._hooks[module] = _Hook(self, module, cast(nn.Linear, self.model.get_submodule(module)))
                self._hooks[module].users += 1
            self._held[name] = held

    def detach(self, name: str) -> None:
        """Forget adapter ``name``; a module that no adapter touches any more loses its hook."""
        with self._lock:
            held = self._held.pop(self._known(name))
            self._recent.pop(name, None)
            for module in held.shapes():
                hook = self._hooks[module]
                hook.users -= 1
                if not hook.users:
                    hook.remove()
                    del self._hooks[module]
            self._last = None

    def described(self, name: str, modules: Sequence[str]) -> Described:
        """Adapter ``name`` as native code reads it, for a model's ``modules`` (the same list at every call)."""
        with self._lock:
            return self._use(name).described(modules)

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

    def segments(self, names: Sequence[str | None]) -> Sequence[tuple[Views, tuple[int, ...]]]:
        """The adapters of a batch, each with its rows, for who runs the layers without their modules."""
        return self._plan(names, 1).batches[len(names)].segments

    def added(self, module: str, x: Tensor, output: Tensor) -> Tensor:
        """``output`` [rows, out], which the plain linear ``module`` made of ``x`` [rows, in], with what the adapters of
        the rows (``rows``) add; for who computes it by other means than the module. May change ``output``."""
        hook = self._hooks.get(module)
        found = None if hook is None else hook(cast(nn.Linear, self.model.get_submodule(module)), (x,), {}, output)
        return output if found is None else found

    def _plan(self, names: Sequence[str | None], expand: int) -> _Plan:
        if isinstance(names, str):
            raise AdapterError(f"adapter_names is {names!r}; give a list with one name for each row of the batch.")
        if self.model.training:
            raise AdapterError("rows of different adapters are for inference; call model.eval() first.")
        last, asked = self._last, (tuple(names), expand)
        if last is not None and (last.names, last.expand) == asked:
            return last
        with self._lock:
            views = {name: self._use(name).views() for name in names if name is not None and name != BASE}
        batches = {}
        for repeat in {1, expand}:
            owners = [name for name in names for _ in range(repeat)]
            rows = {name: tuple(i for i, owner in enumerate(owners) if owner == name) for name in views}
            batches[len(owners)] = _Batch(len(owners), [(views[name], found) for name, found in rows.items()])
        self._last = _Plan(*asked, batches)
        return self._last

    def _use(self, name: str) -> Held:
        """An adapter that is about to be used; those longest out of use are reduced to their bytes."""
        found = self._held[self._known(name)]
        self._recent.pop(name, None)
        self._recent[name] = None
        for other in list(self._recent)[:-IN_USE]:  # a plan that still runs keeps its own reference
            self._recent.pop(other)
            self._held[other].release()
        return found

    def _known(self, name: str) -> str:
        if name not in self._held:
            shown = [*map(repr, list(self._held)[:8]), *["..."][: len(self._held) > 8]]
            raise AdapterError(f"no adapter {name!r} is attached; attached: {', '.join(shown) or 'none'}.")
        return name

    def _check(self, name: str, module: str, widths: tuple[int, int], held: Held | None) -> None:
        """Raise AdapterError unless the module is there, linear, as wide, and its blocks (with ``held``) fit and are
        finite."""
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
        if held is None:
            return
        for a, bt in held.blocks().get(module, ()):
            shapes = tuple(a.shape), tuple(bt.shape)
            if shapes != ((a.shape[0], widths[0]), (a.shape[0], widths[1])):
                raise AdapterError(
                    f"adapter {name!r} has factors of shapes {shapes} that do not fit module {module!r}."
                )
        if not held.finite(module):
            raise AdapterError(f"adapter {name!r} holds NaN or infinity at module {module!r}; it is refused.")


class _Hook:
    """What the bank adds at one module that ``users`` adapters touch."""

    def __init__(self, bank: AdapterBank, module: str, linear: nn.Linear) -> None:
        self.bank, self.module, self.features = bank, module, linear.out_features
        self.users = 0
        if isinstance(linear, QuantLinear):
            linear.deltas = self.deltas
            self.remove: Callable[[], None] = partial(setattr, linear, "deltas", None)
        else:
            self.remove = linear.register_forward_hook(self, with_kwargs=True).remove

    def deltas(self, x: Tensor, start: Start | None = None) -> Tensor | None:
        """The sum for each row of ``x``, float32, with a ``start``; None where no adapter of the batch touches the
        module, whether there is a start or not."""
        batch = self._batch(x)
        if batch is None or self.module not in batch.touched:
            return None
        if not cpu_lora.at_once(x):
            return multi_lora(x, batch.on(self.module, x.device), self.features, start)
        out = torch.empty(*x.shape[:-1], self.features)
        cpu_lora.run(x, batch.rows, [batch.job(self.module, self.features, start).to(out, add=False)])
        return out

    def __call__(
        self, linear: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        x: Tensor = args[0] if args else kwargs["input"]
        batch = self._batch(x)
        if batch is None or self.module not in batch.touched:
            return None
        if not cpu_lora.at_once(x, output):
            return (output + multi_lora(x, batch.on(self.module, x.device), self.features)).to(output.dtype)
        cpu_lora.run(x, batch.rows, [batch.job(self.module, self.features).to(output, add=True)])  # a fresh output
        return None

    def _batch(self, x: Tensor) -> _Batch | None:
        plan = _ACTIVE.get().get(id(self.bank))
        if plan is None:
            return None
        batch = plan.batches.get(x.shape[0])
        if batch is None:
            expected = " or ".join(str(n) for n in sorted(plan.batches))
            raise AdapterError(
                f"module {self.module!r} got a batch of {x.shape[0]} rows where adapter names were given for "
                f"{expected}; give one name for each row."
            )
        return batch


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
