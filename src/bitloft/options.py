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
from bitloft.patterns import first_layers_of, number_rule, patterns, split_rule, steps_of

SOLVERS = ("loftq", "qlora", "qalora")
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
    """How a base is quantized and how its LoRA start is found.

    Patterns are shell patterns over module paths or their ends after a dot; the first one that matches counts, and one
    that matches nothing is refused (by ``rules.resolve``, which knows the modules).
    """

    format: str = option("lm4:64", "number format of the weights, such as nf4:64, lm2:64 or uniform3:128")
    solver: str = option(
        "loftq",
        "loftq (repair the error with a low-rank start), qlora (round, start at zero; published with format nf4:64+dq) "
        "or qalora (round to a format with +shift, into which pooled adapters merge)",
    )
    rank: int = option(16, "rank of the start; 0 stores none")
    alpha: float | None = option(None, "scaling numerator of the start (default: the rank)")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    rank_for: tuple[str, ...] = option((), "PATTERN=RANK: another rank for the matching modules; repeat for more")
    alpha_for: tuple[str, ...] = option((), "PATTERN=ALPHA: another alpha for the matching modules; repeat for more")
    steps: int | str = option(5, "LoftQ alternations T, or auto: until the error stops falling; the best one is kept")
    rules: tuple[str, ...] = option((), "PATTERN=FORMAT: another format for the matching modules; repeat for more")
    first_layers: str | None = option(None, "K=FORMAT: another format for the first K layers, such as 4=nf4:64")
    rest: str | None = option(None, "format of all other layers where first_layers is given (the same as format)")
    target_bits: float | None = option(
        None, "true bits per weight, scales counted, start not: each matrix gets the width where bytes help most"
    )
    check_text: str | None = option(
        None, "text file: keep the widths of target_bits only where they beat one width for all in perplexity"
    )
    target: tuple[str, ...] = option((), "quantize only linears whose name matches one of these shell patterns")
    skip: tuple[str, ...] = option((), "leave linears whose name matches one of these shell patterns in 16 bit")
    embeddings: bool = option(False, "quantize token tables too; with a tied head, head must be given as well")
    head: bool = option(False, "quantize the output head too; with a tied table, embeddings must be given as well")
    start_format: str = option("lm4:64", "number format in which the start's factors are stored")
    seed: int = option(0, "seed of the randomized SVD")

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", steps_of(self.steps))
        for name in ("rank_for", "alpha_for", "rules", "target", "skip"):
            object.__setattr__(self, name, patterns(name, getattr(self, name)))
        self._take_rest()
        for text in (self.format, self.start_format, *(split_rule("rules", rule)[1] for rule in self.rules)):
            Format.parse(text)
        _require_choices(solver=(self.solver, SOLVERS))
        require(self.rank >= 0, f"rank is {self.rank}; use 0 or more.")
        require(self.alpha is None or self.alpha > 0, f"alpha is {self.alpha}; use a positive number.")
        for rule in self.rank_for:
            require(number_rule("rank_for", rule) % 1 == 0, f"rank_for {rule!r}: use a whole number.")
        for rule in self.alpha_for:
            require(number_rule("alpha_for", rule) > 0, f"alpha_for {rule!r}: use a positive number.")
        first_layers_of(self.first_layers)
        _require_positive(self, "target_bits")
        fixed = [name for name in ("rules", "first_layers") if getattr(self, name)]
        require(
            self.target_bits is None or not fixed,
            f"target_bits chooses the format of every matrix, and {' and '.join(fixed)} too; leave one of them out.",
        )
        require(
            self.check_text is None or self.target_bits is not None,
            "check_text compares the widths that target_bits chose; give target_bits too or leave check_text out.",
        )

    def _take_rest(self) -> None:
        """``rest`` is another spelling of ``format``, for the paper's rule."""
        if self.rest is None:
            return
        require(self.first_layers is not None, "rest is the format after the first layers; give first_layers too.")
        require(
            self.format in (self.rest, type(self).format),
            f"format {self.format} and rest {self.rest} are two formats for the same layers; leave one of them out.",
        )
        object.__setattr__(self, "format", self.rest)

    @property
    def start_rank(self) -> int:
        """Rank of the start that is stored: only LoftQ's is not zero."""
        return self.rank if self.solver == "loftq" else 0

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

    def __post_init__(self) -> None:
        _require_choices(codes=(self.codes, CODES))
        require(self.rank is None or self.rank >= 0, f"rank is {self.rank}; use 0 or more.")
        if self.codes == "kept":
            require(self.format is None, f"format {self.format} asks for new codes; leave it out or use codes new.")
            require(self.rank != 0, "rank 0 leaves no start that could take the adapter in; use codes new.")
        if self.format is not None:
            Format.parse(self.format)
        _require_positive(self, "length", "limit", "batch")


TARGETS = ("dense", "portable", "bitsandbytes")
CONTAINS = ("task", "start")
DENSE_DTYPES = ("auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ConvertOptions:
    """What a base, or an adapter with it, is turned into for use without bitloft."""

    to: str = option("dense", "dense (a 16-bit folder), portable (a LoRA for the original model) or bitsandbytes (nf4)")
    dtype: str = option("auto", "float16, bfloat16 or float32 of what is not packed; auto: as the base has it")
    contains: str = option("task", "portable: what the adapter's B*A holds: task, or start (start and task in one)")
    length: int = option(512, "tokens of a sequence that the loss is measured on")
    limit: int | None = option(None, "measure the loss on the first so many sequences only")
    batch: int = option(4, "sequences in a batch")

    def __post_init__(self) -> None:
        _require_choices(to=(self.to, TARGETS), dtype=(self.dtype, DENSE_DTYPES), contains=(self.contains, CONTAINS))
        portable = self.to == "portable"
        require(portable or self.contains == "task", f"contains does not apply to {self.to}; leave it out.")
        require(not portable or self.dtype == "auto", "a portable adapter is float32; leave dtype out.")
        _require_positive(self, "length", "limit", "batch")
