"""How an adapter is packed, and how it is moved to another base."""

from dataclasses import dataclass

from bitloft.options.fields import (
    DTYPES,
    base_mismatch,
    option,
    require,
    require_choices,
    require_mismatch,
    require_positive,
)

METHODS = {
    "waterfill": ("bits", "quality", "code", "weigh", "distill"),
    "loraquant": ("high", "ratio", "split"),
    "rtn": ("high",),
    "sign": (),
    "gptq": ("high",),
    "truncate": ("rank", "width"),
    "shrink": ("quality",),
}
DEFAULTS: dict[str, str | float | int] = {
    "bits": 0.8,
    "code": "trellis",
    "high": 2,
    "ratio": 0.8,
    "split": "svd",
    "rank": 1,
    "width": 16,
}


@dataclass(frozen=True)
class CompressOptions:
    """How an adapter is packed: by water-filling under a budget or a quality, as LoRAQuant's paper does, or by a
    baseline to compare with. What a method does not use must be left out."""

    method: str = option(
        "waterfill",
        "waterfill (one budget over all components), loraquant (as published), or a baseline: rtn, sign, gptq, "
        "truncate (a lower rank), shrink (no compression: a control)",
    )
    bits: float | None = option(None, "true bits per trained value, all files counted; for waterfill (default: 0.8)")
    quality: float | None = option(
        None, "in place of bits: the smallest size with a relative squared error of at most this; for waterfill, shrink"
    )
    code: str | None = option(
        None,
        "codes of waterfill: trellis (neighbouring values share their choices) or scalar (Lloyd-Max; default: trellis)",
    )
    high: int | None = option(None, "bits of loraquant's leading components (2 or 3), of rtn and gptq (default: 2)")
    ratio: float | None = option(None, "energy share of the leading components; for loraquant (default: 0.8)")
    split: str | None = option(None, "loraquant's ablation: leading by svd, norm or random (default: svd)")
    rank: int | None = option(None, "rank that truncate keeps (default: 1)")
    width: int | None = option(None, "bits of a value that truncate keeps, 16 or 8 (default: 16)")
    refine: bool = option(True, "waterfill: joint refinement of codes; loraquant: search of the ranges")
    weigh: int | None = option(
        None,
        "waterfill: errors count by what they do to the loss on so many first sequences of --data (16 to 32 will do); "
        "needs --base and --data",
    )
    distill: int | None = option(
        None, "waterfill: steps of distillation on --data after packing, at the same size; needs --base and --data"
    )
    distill_codes: bool = option(True, "distill scales and codes; without, the scales alone")
    length: int = option(256, "tokens of a sequence of --data")
    batch: int = option(4, "sequences of --data in a batch")
    seed: int = option(0, "seed of the order in which distillation takes the data")
    base_mismatch: str | None = base_mismatch()

    def __post_init__(self) -> None:
        require_choices(method=(self.method, METHODS))
        used = METHODS[self.method]
        for name in ("bits", "quality", "code", "high", "ratio", "split", "rank", "width", "weigh", "distill"):
            ok = name in used or getattr(self, name) is None
            require(ok, f"{name} does not apply to method {self.method}; leave it out.")
        require(self.bits is None or self.quality is None, "bits and quality are two ways to choose a size; give one.")
        require_positive(self, "bits", "rank", "weigh", "distill", "batch")
        require(self.length >= 2, f"length is {self.length}; use 2 or more.")
        require(self.distill is not None or self.distill_codes, "distill_codes applies to distill; give its steps.")
        require_mismatch(self.base_mismatch)
        require(self.quality is None or 0 < self.quality < 1, f"quality is {self.quality}; use an error from 0 to 1.")
        highs, words = ((2, 3), "2 or 3") if self.method == "loraquant" else ((2, 3, 4), "2, 3 or 4")
        require(self.high is None or self.high in highs, f"high is {self.high}; use {words}.")
        require(self.method != "shrink" or self.quality is not None, "shrink needs quality, the error to imitate.")
        require(self.ratio is None or 0 < self.ratio <= 1, f"ratio is {self.ratio}; use a share above 0, at most 1.")
        require_choices(
            split=(self.split or "svd", ("svd", "norm", "random")), code=(self.code or "trellis", ("trellis", "scalar"))
        )
        require(self.width in (None, 8, 16), f"width is {self.width}; use 16 or 8.")

    @property
    def settings(self) -> dict[str, str | float | int | bool]:
        """The method with its settings, defaults filled in, as the manifest records them."""
        found: dict[str, str | float | int | bool] = {"name": self.method}
        for name in METHODS[self.method]:
            value = DEFAULTS.get(name) if getattr(self, name) is None else getattr(self, name)
            if value is not None and not (name == "bits" and self.quality is not None):
                found[name] = value
        if found.get("split") == "svd":
            del found["split"]
        if not self.distill_codes:
            found["distill_codes"] = False
        return found if self.refine else found | {"refine": False}


@dataclass(frozen=True)
class RebaseOptions:
    """How an adapter is moved to another base of the same model: the course of a short distillation."""

    steps: int = option(200, "optimizer steps")
    lr: float = option(2e-4, "peak learning rate (cosine after a short warm-up)")
    batch: int = option(4, "sequences in a batch")
    length: int = option(256, "tokens of a sequence; documents are cut into such blocks, longer rows lose their end")
    seed: int = option(0, "seed of the order of the data")
    dtype: str = option("auto", "bfloat16 (autocast), float32, or auto: bfloat16 where the processor computes in it")

    def __post_init__(self) -> None:
        require_choices(dtype=(self.dtype, DTYPES))
        require_positive(self, "steps", "lr", "batch")
        require(self.length >= 2, f"length is {self.length}; use 2 or more.")
