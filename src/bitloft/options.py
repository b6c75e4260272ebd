"""Every verb's options as frozen dataclasses, without torch: the CLI is made from them, and so is the Python API.

A field's ``help`` becomes the flag's help text. Values are checked here, once, before any file is touched.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from bitloft.errors import OptionError
from bitloft.formats import Format

SOLVERS = ("loftq", "qlora")
STARTS = ("frozen", "trainable")


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the CLI."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    """Raise OptionError(message) unless ``condition``."""
    if not condition:
        raise OptionError(message)


@dataclass(frozen=True)
class QuantizeOptions:
    """How a base is quantized and how its LoRA start is found."""

    format: str = option("lm4:64", "number format of the weights, such as nf4:64, lm2:64 or uniform3:128")
    solver: str = option("loftq", "loftq (repair the error with a low-rank start) or qlora (round, start at zero)")
    rank: int = option(16, "rank of the start; 0 stores none")
    alpha: float | None = option(None, "scaling numerator of the start (default: the rank)")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    steps: int = option(5, "LoftQ alternations T; the best iterate is kept")
    target: tuple[str, ...] = option((), "quantize only linears whose name matches one of these shell patterns")
    skip: tuple[str, ...] = option((), "leave linears whose name matches one of these shell patterns in 16 bit")
    start_format: str = option("lm4:64", "number format in which the start's factors are stored")
    seed: int = option(0, "seed of the randomized SVD")

    def __post_init__(self) -> None:
        for text in (self.format, self.start_format):
            Format.parse(text)
        require(self.solver in SOLVERS, f"unknown solver {self.solver!r}; use one of {', '.join(SOLVERS)}.")
        require(self.rank >= 0, f"rank is {self.rank}; use 0 or more.")
        require(self.alpha is None or self.alpha > 0, f"alpha is {self.alpha}; use a positive number.")
        require(self.steps >= 1, f"steps is {self.steps}; use 1 or more.")

    @property
    def start_rank(self) -> int:
        """Rank of the start that is stored: qlora's is zero and is left out."""
        return 0 if self.solver == "qlora" else self.rank

    @property
    def scaling(self) -> float:
        """s0 of W ~ Q + s0 * B0 @ A0: alpha / r, or alpha / sqrt(r) with rslora; 0 without a start."""
        if not self.start_rank:
            return 0.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)


SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainOptions:
    """How an adapter is trained: its shape, the optimizer's course (AdamW, gradients clipped at norm 1), the data."""

    start: str = option("frozen", "frozen (a fresh adapter over the base's start) or trainable (the start itself)")
    rank: int | None = option(None, "rank of the adapter (default: 16; with a trainable start, the start's own)")
    alpha: float | None = option(None, "scaling numerator (default: the rank; with a trainable start, the start's own)")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    dropout: float = option(0.0, "share of the adapter's inputs that is dropped in training")
    target: tuple[str, ...] = option((), "adapt only linears whose name matches one of these shell patterns")
    epochs: float = option(1.0, "passes over the data")
    steps: int | None = option(None, "optimizer steps, instead of epochs")
    lr: float = option(5e-4, "peak learning rate")
    schedule: str = option("cosine", "learning rate after the warm-up: cosine, linear (both to zero) or constant")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises")
    batch: int = option(4, "sequences in a batch")
    accumulate: int = option(1, "batches in an optimizer step")
    length: int = option(512, "tokens of a sequence; documents are cut into such blocks, longer rows lose their end")
    seed: int = option(0, "seed of the adapter's beginning, the order of the data and dropout")
    dtype: str = option("auto", "bfloat16 (autocast), float32, or auto: bfloat16 where the processor computes in it")
    save_every: int = option(50, "steps between checkpoints to resume from; 0 writes none")
    log_every: int = option(5, "steps over which a logged loss is averaged")
    resume: bool = option(False, "go on from the last checkpoint of an interrupted run with the same settings")

    def __post_init__(self) -> None:
        _require_choices(start=(self.start, STARTS), schedule=(self.schedule, SCHEDULES), dtype=(self.dtype, DTYPES))
        frozen = self.start == "frozen"
        for name in ("rank", "alpha", "rslora", "target"):
            given = getattr(self, name) not in (None, False, ())
            require(frozen or not given, f"{name} is fixed by the base where its start is trained; leave {name} out.")
        _require_positive(self, "rank", "alpha", "epochs", "steps", "lr", "batch", "accumulate", "log_every")
        require(self.length >= 2, f"length is {self.length}; use 2 or more.")
        require(self.save_every >= 0, f"save_every is {self.save_every}; use 0 (no checkpoints) or more.")
        for name in ("dropout", "warmup"):
            share = getattr(self, name)
            require(0 <= share < 1, f"{name} is {share}; use a share from 0 to below 1.")


@dataclass(frozen=True)
class EvalOptions:
    """How held-out loss is measured."""

    length: int = option(512, "tokens of a sequence; documents are cut into such blocks, longer rows lose their end")
    limit: int | None = option(None, "measure on the first so many sequences only")
    batch: int = option(4, "sequences in a batch")
    dtype: str = option("float32", "float32, bfloat16 (autocast), or auto: bfloat16 where the processor computes in it")

    def __post_init__(self) -> None:
        _require_choices(dtype=(self.dtype, DTYPES))
        _require_positive(self, "limit", "batch")
        require(self.length >= 2, f"length is {self.length}; use 2 or more.")


# Methods of compress and the fields that apply to each.
METHODS = {
    "waterfill": ("bits", "quality"),
    "loraquant": ("high", "ratio", "split"),
    "rtn": ("high",),
    "sign": (),
    "gptq": ("high",),
    "truncate": ("rank", "width"),
    "shrink": ("quality",),
}
DEFAULTS: dict[str, str | float | int] = {"bits": 0.8, "high": 2, "ratio": 0.8, "split": "svd", "rank": 1, "width": 16}


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
    high: int | None = option(None, "bits of loraquant's leading components (2 or 3), of rtn and gptq (default: 2)")
    ratio: float | None = option(None, "energy share of the leading components; for loraquant (default: 0.8)")
    split: str | None = option(None, "loraquant's ablation: leading by svd, norm or random (default: svd)")
    rank: int | None = option(None, "rank that truncate keeps (default: 1)")
    width: int | None = option(None, "bits of a value that truncate keeps, 16 or 8 (default: 16)")
    refine: bool = option(True, "waterfill: joint refinement of codes; loraquant: search of the ranges")

    def __post_init__(self) -> None:
        _require_choices(method=(self.method, METHODS))
        used = METHODS[self.method]
        for name in ("bits", "quality", "high", "ratio", "split", "rank", "width"):
            ok = name in used or getattr(self, name) is None
            require(ok, f"{name} does not apply to method {self.method}; leave it out.")
        require(self.bits is None or self.quality is None, "bits and quality are two ways to choose a size; give one.")
        _require_positive(self, "bits", "rank")
        require(self.quality is None or 0 < self.quality < 1, f"quality is {self.quality}; use an error from 0 to 1.")
        highs, words = ((2, 3), "2 or 3") if self.method == "loraquant" else ((2, 3, 4), "2, 3 or 4")
        require(self.high is None or self.high in highs, f"high is {self.high}; use {words}.")
        require(self.method != "shrink" or self.quality is not None, "shrink needs quality, the error to imitate.")
        require(self.ratio is None or 0 < self.ratio <= 1, f"ratio is {self.ratio}; use a share above 0, at most 1.")
        _require_choices(split=(self.split or "svd", ("svd", "norm", "random")))
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
        return found if self.refine else found | {"refine": False}


def _require_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        require(value is None or (isfinite(value) and value > 0), f"{name} is {value}; use a positive number.")


def _require_choices(**choices: tuple[str, Iterable[str]]) -> None:
    for name, (value, allowed) in choices.items():
        require(value in allowed, f"unknown {name} {value!r}; use one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class GenerateOptions:
    """How prompts are answered."""

    max_tokens: int = option(128, "tokens of an answer at most")
    temperature: float = option(0.0, "0 takes the likeliest token; higher values sample")
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this share of the probability")
    seed: int = option(0, "seed of the sampling")
    raw: bool = option(False, "continue the prompt as it is, without the chat template")

    def __post_init__(self) -> None:
        _require_positive(self, "max_tokens", "top_p")
        require(
            isfinite(self.temperature) and self.temperature >= 0, f"temperature is {self.temperature}; use 0 or more."
        )
        require(self.top_p <= 1, f"top_p is {self.top_p}; use a share above 0 and up to 1.")


LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "BITLOFT_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """How a base and its adapters are served."""

    name: str | None = option(None, "model name of the base (default: the name of its directory)")
    host: str = option("127.0.0.1", "address to listen on; others than this machine need a key")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = field(
        default=None, repr=False, metadata={"help": f"key that clients must send (default: {KEY_VARIABLE}, if set)"}
    )
    insecure_no_auth: bool = option(False, "allow a host that others reach without a key")
    max_batch: int = option(8, "requests that are computed at the same time")
    max_queue: int = option(64, "requests that may wait; more are refused with status 429")
    context: int | None = option(None, "tokens of prompt and answer together (default: the model's own limit)")
    max_tokens: int = option(1024, "tokens of an answer that a request may ask for")
    queue_seconds: float = option(30.0, "a request that waited longer is refused with status 503")
    request_seconds: float = option(600.0, "a request that takes longer ends with an error")
    drain_seconds: float = option(30.0, "time that running requests have to end after SIGTERM")

    def __post_init__(self) -> None:
        _require_positive(self, "max_batch", "max_queue", "context", "max_tokens", "queue_seconds", "request_seconds")
        require(0 <= self.port < 1 << 16, f"port is {self.port}; use 0 to 65535.")
        require(
            isfinite(self.drain_seconds) and self.drain_seconds >= 0,
            f"drain_seconds is {self.drain_seconds}; use 0 or more.",
        )
        require(
            self.host in LOOPBACK or self.key is not None or self.insecure_no_auth,
            f"host {self.host} is reached from other machines; set a key (api_key or {KEY_VARIABLE}) or allow it "
            "without one (insecure_no_auth).",
        )

    @property
    def key(self) -> str | None:
        """The key that clients must send, None for none: the option, else the environment's."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None
