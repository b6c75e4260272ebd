"""A base to try an adapter on while it is packed: what it does there, and a distillation of its codes.

compress works on the adapter alone; only a base mismatch that is measured, and ``distill``, need the model. It is then
loaded once, whole, and serves as its own teacher: the adapter as trained gives the answers, the packed one learns to
give them at the size that it has.
"""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.adapters import Adapter, PackedBlock, PackedModule
from bitloft.errors import AdapterError, OptionError
from bitloft.integrations.loading import load
from bitloft.integrations.mismatch import (
    BUILT_IN,
    Change,
    Labeled,
    Trial,
    built_in,
    decide,
    mismatch_of,
    require_finite,
    sentence,
)
from bitloft.integrations.opening import open_model
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.modules.multi import AdapterBank
from bitloft.modules.trial import Coded, applied, packed_again
from bitloft.options import CompressOptions
from bitloft.packing import Distilled, Metric
from bitloft.sensitivity import second_moments
from bitloft.tasks.distill import Batch, Course, Progress, descend, divergences, hold_out, mean_loss
from bitloft.tasks.lm import Collator, Example, check_length, encode_rows, target_logits, target_losses
from bitloft.tasks.rows import read_rows

KEY = "adapter"
MEASURED = 64  # sequences of a text on which a mismatch is measured
# Peak learning rate of the latents, in units of a format's levels (their spread is about 1), and its share for scales,
# which are factors exp(t). Measured: docs/decisions.md.
RATE, SCALES = 0.05, 0.2


class Ground:
    """The base in directory ``base``, and the rows of ``data`` (None: none were given)."""

    def __init__(self, base: Path, data: Path | None, options: CompressOptions) -> None:
        self.base, self.data, self.options = base, data, options
        self.record = base_record(base)

    @cached_property
    def bank(self) -> AdapterBank:
        """The bank of the loaded base, which is frozen whole."""
        return AdapterBank(load(self.base).requires_grad_(False))

    @cached_property
    def examples(self) -> list[Example]:
        """The sequences of the data. Raises DataError for rows that cannot be read."""
        rows, tokenizer = read_rows(self.data or ""), load_tokenizer(self.base)
        check_length(self.options.length, self.bank.model.config)
        return encode_rows(rows, tokenizer, self.options.length)[0]

    def metric(self, rows: int) -> Metric:
        """Where errors matter to the loss on the first ``rows`` sequences of the data."""
        found = second_moments(self.bank.model, self.data or "", rows=rows, length=self.options.length)
        return Metric(found.inputs, found.outputs)

    def met(self, adapter: Adapter, trained_on: str | Path | None) -> str | None:
        """What is to be told of an adapter that does not name this base, None of one that does.

        With ``trained_on`` it is measured on that model too. Raises AdapterError where it is refused.
        """
        where, found = str(adapter.path), mismatch_of(adapter, self.record)
        if found is None:
            return None
        choice = decide(found, self.record, self.options.base_mismatch, where)
        if choice == "allow":
            return sentence(found, self.record, None, BUILT_IN)
        self.bank.attach(KEY, adapter)
        change = Trial(self.bank, self._sequences).change(KEY)
        require_finite(change, found, where)
        text = BUILT_IN if self.data is None else self.data.name
        home = None if trained_on is None else self._at_home(adapter, trained_on)
        return sentence(found, self.record, change, text, home)

    def _sequences(self) -> Sequence[Labeled] | str:
        if self.data is None:
            return built_in(self.base, self.bank.model.config)
        return [Labeled(example.ids, example.labels) for example in self.examples[:MEASURED]]

    def _at_home(self, adapter: Adapter, trained_on: str | Path) -> Change | str:
        home = open_model(trained_on)
        if home.record is not None and adapter.base not in (None, home.record.fingerprint):
            raise AdapterError(
                f"{trained_on} is {home.record.fingerprint[:12]}, but {adapter.path} was trained for the base "
                f"{str(adapter.base)[:12]}; give that one."
            )
        bank = AdapterBank(home.model)
        bank.attach(KEY, adapter)
        return Trial(bank, self._sequences).change(KEY)

    def distill(
        self, adapter: Adapter, modules: Sequence[PackedModule], progress: Progress | None
    ) -> tuple[Mapping[str, tuple[PackedBlock, ...]], Distilled]:
        """Blocks by module after ``options.distill`` steps towards the adapter's own answers, and what they changed.

        Raises DataError where the data has too little to hold some out, OptionError where nothing is packed.
        """
        began, options = time.perf_counter(), self.options
        if KEY not in self.bank.names:
            self.bank.attach(KEY, adapter)
        learned, judged = hold_out(self.examples)
        before = {m.name: m.blocks for m in modules if m.blocks}
        if not before:
            raise OptionError(f"{adapter.path} packs to nothing; there is nothing to distill.")
        factors = _coded(before, options.distill_codes)
        collate = Collator.for_tokenizer(load_tokenizer(self.base))
        groups = [{"params": [f.growth for f in factors.values()], "pace": SCALES}]
        if options.distill_codes:
            groups.append({"params": [p for f in factors.values() for p in (*f.a, *f.bt)], "pace": 1.0})
        course = Course(options.distill or 0, RATE, options.batch, options.seed)
        descend(lambda batch: self._divergences(batch, factors), groups, learned, collate, course, progress)
        after = packed_again(factors)
        full, tokens = mean_loss(self._losses, judged, collate, options.batch)
        first, last = (
            mean_loss(partial(self._losses, factors=_coded(blocks)), judged, collate, options.batch)[0]
            for blocks in (before, after)
        )
        kept, seconds = last < first, time.perf_counter() - began
        report = Distilled(course.steps, options.distill_codes, full, first, last, tokens, kept, seconds)
        return after if kept else before, report

    def _divergences(self, batch: Batch, factors: Mapping[str, Coded]) -> Float[Tensor, " targets"]:
        model = self.bank.model
        with torch.no_grad(), self.bank.rows([KEY] * len(batch["labels"])):
            wanted, _ = target_logits(model, batch)
        with applied(model, factors):
            logits, _ = target_logits(model, batch)
        return divergences(logits, wanted)

    def _losses(self, batch: Batch, factors: Mapping[str, Coded] | None = None) -> Float[Tensor, " targets"]:
        """Loss of each target with the adapter as trained, or with these factors."""
        model = self.bank.model
        with self.bank.rows([KEY] * len(batch["labels"])) if factors is None else applied(model, factors):
            return target_losses(model, batch)[0]


def _coded(blocks: Mapping[str, tuple[PackedBlock, ...]], codes: bool = True) -> dict[str, Coded]:
    return {name: Coded(own, codes=codes) for name, own in blocks.items()}
