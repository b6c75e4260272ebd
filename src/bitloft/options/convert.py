"""How an adapter is merged into a base, and what a base is turned into."""

from dataclasses import dataclass

from bitloft.formats import Format
from bitloft.options.fields import base_mismatch, option, require, require_choices, require_mismatch, require_positive

CODES = ("new", "kept")


@dataclass(frozen=True)
class MergeOptions:
    """How an adapter is worked into a packed base, and how the loss is measured where a text is given."""

    codes: str = option(
        "new", "new (quantize the sum again) or kept (the start takes the adapter in, at a higher rank)"
    )
    rank: int | None = option(None, "rank of the merged start, 0 for none (default: the base's; kept: the sum of both)")
    format: str | None = option(None, "number format of the merged matrices (default: the one they have)")
    length: int = option(512, "tokens of a sequence that the loss is measured on")
    limit: int | None = option(None, "measure the loss on the first so many sequences only")
    batch: int = option(4, "sequences in a batch")
    base_mismatch: str | None = base_mismatch()

    def __post_init__(self) -> None:
        require_mismatch(self.base_mismatch)
        require_choices(codes=(self.codes, CODES))
        require(self.rank is None or self.rank >= 0, f"rank is {self.rank}; use 0 or more.")
        if self.codes == "kept":
            require(self.format is None, f"format {self.format} asks for new codes; leave it out or use codes new.")
            require(self.rank != 0, "rank 0 leaves no start that could take the adapter in; use codes new.")
        if self.format is not None:
            Format.parse(self.format)
        require_positive(self, "length", "limit", "batch")


TARGETS = ("dense", "portable", "bitsandbytes", "gptq")
CONTAINS = ("task", "start")
DENSE_DTYPES = ("auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ConvertOptions:
    """What a base, or an adapter with it, is turned into for use without bitloft."""

    to: str = option(
        "dense",
        "dense (a 16-bit folder), portable (a LoRA for the original model), bitsandbytes (nf4) or gptq (uniform codes)",
    )
    dtype: str = option("auto", "float16, bfloat16 or float32 of what is not packed; auto: as the base has it")
    contains: str = option("task", "portable: what the adapter's B*A holds: task, or start (start and task in one)")
    length: int = option(512, "tokens of a sequence that the loss is measured on")
    limit: int | None = option(None, "measure the loss on the first so many sequences only")
    batch: int = option(4, "sequences in a batch")
    base_mismatch: str | None = base_mismatch()

    def __post_init__(self) -> None:
        require_mismatch(self.base_mismatch)
        require_choices(to=(self.to, TARGETS), dtype=(self.dtype, DENSE_DTYPES), contains=(self.contains, CONTAINS))
        portable = self.to == "portable"
        require(portable or self.contains == "task", f"contains does not apply to {self.to}; leave it out.")
        require(not portable or self.dtype == "auto", "a portable adapter is float32; leave dtype out.")
        require_positive(self, "length", "limit", "batch")
