"""A base directory as a model: which class, which dtype; packed adapters attached by name."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from bitloft.adapters import is_packed, read_adapter, read_packed
from bitloft.checkpoint import read_json
from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.integrations import register
from bitloft.integrations.mismatch import Gate
from bitloft.integrations.record import BaseRecord, base_record
from bitloft.integrations.rounding import round_activations
from bitloft.modules import arrangement
from bitloft.modules.linear import quant_linears
from bitloft.modules.multi import AdapterBank, install
from bitloft.options import STARTS
from bitloft.options.fields import require_mismatch

log = logging.getLogger("bitloft")


def load(
    directory: Path | str,
    *,
    adapters: Mapping[str, Path | str] | None = None,
    start: str = "frozen",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
    base_mismatch: str | None = None,
    arrange: bool = True,
    batch_invariant: bool = False,
    activations: str | None = None,
) -> PreTrainedModel:
    """A packed base with its start, in eval mode, and packed adapters attached by name.

    With adapters, ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` take one name
    per row, ``"__base__"`` meaning none. ``start="trainable"`` leaves the start out of the forward, for the caller to
    hand to PEFT. ``dtype`` is that of the parts that are not packed: by default float32 on CPU, else as stored.
    ``base_mismatch`` (refuse, measure or allow) answers for adapters that do not name this base, by default as
    ``integrations.mismatch`` says; what is let through is logged as a warning. ``arrange`` brings the codes on a CPU
    into the order that one row of input is multiplied fastest in (same size; saving and copying give the stored
    order); leave it out for training and before sharding. ``batch_invariant`` makes what a row gets from a packed layer
    independent of the rows beside it, which makes one row of float32 input take twice the time.
    ``activations`` (bf16 or int8) rounds what packed layers multiply; how much that moves them is measured and logged
    as a warning (``integrations.rounding``).
    Raises CheckpointError for a directory that is damaged or no base, AdapterError for an adapter that is refused.
    """
    if start not in STARTS:
        raise OptionError(f"start is {start!r}; use one of {', '.join(STARTS)}.")
    require_mismatch(base_mismatch)
    register()
    directory = Path(directory)
    record = base_record(directory, verify=verify)
    kind = model_class(read_json(directory / "config.json"), str(directory))
    kept = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    with quiet_loading():
        model: PreTrainedModel = kind.from_pretrained(directory, dtype=kept, use_safetensors=True)
    model = model.to(device).eval()
    for layer in quant_linears(model).values():
        layer.start_enabled = start == "frozen"
        layer.batch_invariant = batch_invariant
    if arrange:
        arrangement.arrange(model)
    if activations is not None:
        round_activations(model, activations)
    if adapters:
        plain = next((path for path in adapters.values() if not is_packed(Path(path))), None)
        if plain is not None:
            raise AdapterError(f"{plain} is not a packed adapter; make one with `bitloft compress {plain} --out DIR`.")
        attach(model, adapters, record, base_mismatch)
    return model


def attach(
    model: PreTrainedModel, adapters: Mapping[str, Path | str], record: BaseRecord, base_mismatch: str | None
) -> None:
    """Give ``model`` a bank with these adapters, plain or packed; what is let through unnamed is logged."""
    bank = AdapterBank(model)
    gate = Gate(bank, record, base_mismatch)
    for name, path in adapters.items():
        note = gate.attach(name, read_packed(path) if is_packed(path) else read_adapter(path), str(path))
        if note is not None:
            log.warning("adapter %s was %s", name, note)
    install(model, bank)


def model_class(config: Mapping[str, Any], source: str) -> Any:
    """The transformers class that a config names first; never code from the folder."""
    names = config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None or not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise CheckpointError(
            f"{source} names the architecture {names[0] if names else None!r}, which transformers "
            f"{transformers.__version__} does not have."
        )
    return kind


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hold back transformers' loading bar: the verbs show their own progress."""
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()
