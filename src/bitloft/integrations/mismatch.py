"""An adapter on a base that it does not name: what is known of the two, what is done, what the adapter changes there.

An adapter of bitloft names its base by fingerprint. Any other (of another quantization of the model, of the 16-bit
model, of a bitsandbytes base, or one that PEFT wrote, which names a model by name alone) is a mismatch, and one option
answers it everywhere:

    refuse   one sentence, nothing is loaded
    measure  run it: loss of this base with it minus loss without, in nats per token, one sentence in log and report
    allow    run it, and say that it was not measured

By default a mismatch is measured on a base of at least 4 bits made of the same model, and refused otherwise: at 2 bits
a base differs from its model so much that an adapter of another one may do harm (docs/decisions.md has the numbers).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import abspath
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitloft.adapters import Adapter, PackedAdapter
from bitloft.errors import AdapterError
from bitloft.factors import Factors
from bitloft.integrations.record import BaseRecord, load_tokenizer
from bitloft.modules.multi import AdapterBank

STEADY_BITS = 4  # bases from here on keep adapters of the same model by default
SHOWN = 80  # characters of a name that a file brings
MARKS = ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb", "-4bit")  # what bitsandbytes copies of a model are called
BUILT_IN = "the built-in text"
TEXT = """\
The harbor town wakes before the sun does. Fishing boats leave while the lamps are still lit, and by the time the bakery
opens its door the first of them are small against the horizon. In winter the wind decides who goes out; in summer it is
the price of fuel. Most families have lived here for three generations or more, and they will tell you, if you ask, that
the water was colder when they were children and the catch was larger.

Question: A baker sells 24 loaves in the morning and half as many in the afternoon. How many loaves are sold that day?
Answer: In the afternoon 24 / 2 = 12 loaves are sold. Together that makes 24 + 12 = 36 loaves.

def average(values):
    \"\"\"The mean of a list of numbers; zero for an empty list.\"\"\"
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else 0.0

A library lends books for four weeks. Whoever needs more time can extend the loan twice, unless somebody else has asked
for the book in the meantime. There is no fine for the first late day, because the people at the desk would rather have
the book back than the coin. Once a year they sell what nobody has borrowed for ten years, and with the money they buy
what readers wished for.
"""


class Labeled(NamedTuple):
    """Token ids and labels of one sequence, -100 where no loss is taken."""

    ids: Int[Tensor, "length"]
    labels: Int[Tensor, "length"]


@dataclass(frozen=True)
class Mismatch:
    """Why an adapter may not fit a base, as a participle for sentences; ``same_model`` where only the quantization is
    another one."""

    clause: str
    same_model: bool


@dataclass(frozen=True)
class Change:
    """Mean loss in nats per token without and with an adapter."""

    base: float
    adapted: float
    tokens: int

    def __str__(self) -> str:
        return f"by {self.adapted - self.base:+.4f} nats a token ({self.base:.4f} to {self.adapted:.4f})"


def mismatch_of(adapter: Adapter | PackedAdapter | Factors, record: BaseRecord) -> Mismatch | None:
    """How the adapter came about, None where it names this base by fingerprint."""
    if adapter.base == record.fingerprint:
        return None
    if adapter.start == "foreign":
        return Mismatch("made as the start of a base that another tool quantized", False)
    if adapter.base is None and adapter.source is None:
        return _by_name(adapter.config.get("base_model_name_or_path"), record)
    known = adapter.source is not None and record.source is not None
    same = known and adapter.source == record.source
    whose = "the same model" if same else "another model" if known else "a model that is not recorded"
    if adapter.base is None:
        return Mismatch(f"trained for {whose} in 16 bit, not for a quantized base", same)
    return Mismatch(f"trained for another base (fingerprint {adapter.base[:12]}) of {whose}", same)


def _by_name(name: object, record: BaseRecord) -> Mismatch:
    """An adapter without fingerprints: PEFT writes the name or the folder of what it was trained on, no more."""
    if not isinstance(name, str) or not name:
        return Mismatch("made without a fingerprint or a name of its base", False)
    shown = repr(Path(name).name[:SHOWN])  # the last part: whose folders these were is nobody's business
    if abspath(name) == abspath(record.directory):  # PEFT on a loaded base writes that base's folder
        return Mismatch(f"made without a fingerprint, for this folder ({shown}) by name", True)
    if record.source_name is not None and _stem(name) == _stem(record.source_name):
        return Mismatch(f"made without a fingerprint, for {shown}, by name the model of this base", True)
    return Mismatch(f"made without a fingerprint, for {shown} by name", False)


def _stem(name: str) -> str:
    """What a hub name, a folder and a bitsandbytes copy of one model have in common."""
    last = Path(name.rstrip("/")).name.lower()
    return next((last.removesuffix(mark) for mark in MARKS if last.endswith(mark)), last)


def decide(found: Mismatch, record: BaseRecord, asked: str | None, where: str) -> str:
    """``measure`` or ``allow``. Raises AdapterError where the mismatch is refused; ``where`` names the adapter."""
    choice = asked or ("measure" if found.same_model and record.bits >= STEADY_BITS else "refuse")
    if choice == "refuse":
        raise AdapterError(
            f"adapter {where} was {found.clause}; {record.directory} ({record.bits} bit) is {record.fingerprint[:12]}. "
            "Use the base that it was trained on, move it with `bitloft rebase`, or say base mismatch measure or allow."
        )
    return choice


def admitted(adapter: Adapter | PackedAdapter | Factors, record: BaseRecord, asked: str | None) -> str | None:
    """For verbs whose own losses are the measurement: what is to be told of an adapter that does not name this base.

    Raises AdapterError where it is refused.
    """
    found = mismatch_of(adapter, record)
    if found is None:
        return None
    decide(found, record, asked, str(adapter.path))
    return f"{found.clause}; losses given here are those on this base."


def sentence(
    found: Mismatch, record: BaseRecord, change: Change | str | None, text: str, at_home: Change | str | None = None
) -> str:
    """What is kept of a mismatch that was let through, after "adapter X was".

    ``change`` is what was measured on ``text``, or why nothing was, or None where it was not asked for; ``at_home`` the
    same on the base that the adapter was trained on.
    """
    if not isinstance(change, Change):
        why = "allowed here without a measurement" if change is None else f"not measured here: {change}"
        return f"{found.clause}; {why}."
    said = f"on this base ({record.bits} bit) it changes the loss {change} on {change.tokens} tokens of {text}"
    return f"{found.clause}; {said}" + (f", on its own {at_home}." if isinstance(at_home, Change) else ".")


def built_in(base: Path, config: Any) -> Sequence[Labeled] | str:
    """The built-in text as one sequence, cut at the model's context, or why it cannot be read."""
    if not (base / "tokenizer_config.json").exists():
        return "the base holds no tokenizer"
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    ids = torch.tensor(load_tokenizer(base)(TEXT)["input_ids"][:limit], dtype=torch.long)
    return [Labeled(ids, ids)]


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, sequences: Sequence[Labeled]) -> tuple[float, int]:
    """Loss in nats per target token and the number of targets, one sequence at a time, by the model's own loss."""
    total, count = 0.0, 0
    for sequence in sequences:
        targets = int((sequence.labels[1:] != -100).sum())
        if targets:
            ids, labels = (x[None].to(model.device) for x in (sequence.ids, sequence.labels))
            total += targets * float(model(input_ids=ids, labels=labels, use_cache=False).loss)
            count += targets
    return total / max(count, 1), count


class Trial:
    """Losses of one loaded model without and with adapters of its bank; without them it is computed once.

    ``sequences`` are asked for once, and only where something is measured.
    """

    def __init__(self, bank: AdapterBank, sequences: Callable[[], Sequence[Labeled] | str]) -> None:
        self.bank, self._sequences = bank, sequences
        self._ready: tuple[Sequence[Labeled], float] | str | None = None  # a text says why nothing can be measured

    def change(self, key: str) -> Change | str:
        """Losses without and with the attached adapter ``key``, or why they cannot be measured."""
        model = self.bank.model
        if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
            return f"a {type(model).__name__} does not continue text"
        if self._ready is None:
            found = self._sequences()
            self._ready = found if isinstance(found, str) else (found, mean_loss(model, found)[0])
        if isinstance(self._ready, str):
            return self._ready
        sequences, alone = self._ready
        with self.bank.rows([key]):
            adapted, tokens = mean_loss(model, sequences)
        return Change(alone, adapted, tokens)


class Gate:
    """Lets adapters onto one loaded base; those that do not name it as ``asked``, measured on the built-in text."""

    def __init__(self, bank: AdapterBank, record: BaseRecord, asked: str | None) -> None:
        self.bank, self.record, self.asked = bank, record, asked
        self._trial = Trial(bank, lambda: built_in(record.directory, bank.model.config))

    def attach(self, key: str, adapter: Adapter | PackedAdapter, where: str) -> str | None:
        """Attach ``adapter`` to the bank as ``key`` unless it is there; what is to be told about it, or None.

        ``where`` names it in errors. Raises AdapterError, with nothing attached, where it is refused, does not fit the
        model, or its loss here is not finite.
        """
        found = mismatch_of(adapter, self.record)
        choice = None if found is None else decide(found, self.record, self.asked, where)
        fresh = key not in self.bank.names
        if fresh:
            self.bank.attach(key, adapter)
        if found is None:
            return None
        try:
            change = self._trial.change(key) if choice == "measure" else None
            require_finite(change, found, where)
        except Exception:
            if fresh:
                self.bank.detach(key)
            raise
        return sentence(found, self.record, change, BUILT_IN)


def require_finite(change: Change | str | None, found: Mismatch, where: str) -> None:
    """Raise AdapterError where the measured loss is NaN or infinite."""
    if isinstance(change, Change) and not math.isfinite(change.adapted):
        raise AdapterError(f"adapter {where} was {found.clause}; its loss on this base is {change.adapted}.")
