"""WikiText-2: language modelling on plain text, judged by perplexity.

A local folder holds ``train.txt`` (or ``valid.txt``, where the train split is not at hand: it is 4 MB more) and
``test.txt``. Perplexity depends on context: blocks of ``length`` tokens, each predicted from its own beginning, none
overlapping, as LoftQ's script has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitloft.errors import DataError
from bitloft.tasks.lm import Collator, Example, encode_rows, target_losses
from bitloft.tasks.rows import Row as TextRow
from bitloft.tasks.scores import Score
from bitloft.tasks.sources import Row, Source, read_source
from bitloft.tasks.texts import perplexity_score, token_loss

SOURCE = Source(
    ("text",),
    "Salesforce/wikitext",
    "wikitext-2-raw-v1",
    files={"train": ("train", "valid", "validation"), "test": ("test",)},
)


@dataclass(frozen=True)
class DocumentTask:
    """Rows {"text": ...}; a .txt file is one of them, and so are the lines of the hub's split."""

    name: str = "wikitext2"
    source: Source = SOURCE
    metrics: tuple[str, ...] = ("perplexity", "loss")

    def rows(self, where: str | Path | None, split: str, limit: int | None = None) -> list[Row]:
        if where is None:
            lines = read_source(self.source, None, split, name=self.name)
            return [{"text": "".join(row["text"] for row in lines)}]
        place = Path(where)
        files = [place] if place.is_file() else [place / f"{stem}.txt" for stem in self.source.files[split]]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise DataError(
                f"there is no {split} text of {self.name} at {place}: put {files[0].name} there (plain text), or leave "
                f"the path out to load {self.source.hub} from the hub."
            )
        return [{"text": found.read_text(encoding="utf-8")}]


TASKS = {"wikitext2": DocumentTask()}


@dataclass(frozen=True)
class Documents:
    """Documents on a decoder, cut into blocks of ``length`` tokens; ``limit`` blocks are judged."""

    tokenizer: Any
    length: int
    limit: int | None = None
    shifted = True

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        texts = [TextRow("text.txt", i + 1, "text", text=row["text"]) for i, row in enumerate(rows)]
        return encode_rows(texts, self.tokenizer, self.length)[0]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return Collator.for_tokenizer(self.tokenizer)(examples)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return target_losses(model, batch)[0]

    @torch.inference_mode()
    def judge(self, model: Any, rows: Sequence[Row], batch: int) -> list[Score]:
        loss = token_loss(self, model, self.examples(rows)[: self.limit], batch)
        return [perplexity_score(loss), loss]
