"""How a base is quantized."""

from dataclasses import dataclass, replace

from bitloft.formats import Format
from bitloft.options.fields import option, require, require_choices, require_positive
from bitloft.patterns import first_layers_of, number_rule, patterns, split_rule, steps_of

SOLVERS = ("loftq", "calibrated", "qlora", "qalora")
METRICS = ("full", "diagonal", "none")
FEEDBACK = ("forward", "reverse", "activation", "none")
VARIANTS = ("residual", "projection")
AGAINST = ("text", "teacher")  # what refine compares next tokens with
PARTS = ("start", "scales", "norms", "codes")  # that refine can tune


@dataclass(frozen=True)
class QuantizeOptions:
    """How a base is quantized and how its LoRA start is found.

    Patterns are shell patterns over module paths or their ends after a dot; the first one that matches counts, and one
    that matches nothing is refused (by ``rules.resolve``, which knows the modules).
    """

    format: str = option("lm4:64", "number format of the weights, such as nf4:64, lm2:64 or uniform3:128")
    solver: str = option(
        "loftq",
        "loftq (repair the error with a low-rank start), calibrated (the same where the inputs of a text are), qlora "
        "(round, start at zero; published with format nf4:64+dq) or qalora (round to a format with +shift, into which "
        "pooled adapters merge)",
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
    calibrate: str | None = option(None, "text (.txt or .jsonl) whose activations the calibrated solver measures")
    samples: int = option(128, "sequences of the calibration text")
    calibrate_length: int = option(512, "tokens of a calibration sequence")
    statistics: str | None = option(None, "directory that keeps what was measured, for other runs on the same text")
    fisher: bool = option(
        False, "weigh outputs by the 16-bit model's loss gradients on calibrate; that model is in memory whole"
    )
    metric: str = option("full", "full second moment of the inputs, its diagonal, or none (weights only, no text)")
    feedback: str = option(
        "activation", "order in which codes correct each other: forward, reverse, activation, or none"
    )
    sweeps: int = option(2, "joint refits of scales and codes after the feedback")
    rounds: int = option(3, "rounds of the calibrated solver (1 to 3 pay); the best one is kept")
    variant: str = option(
        "residual", "what later rounds quantize: residual (W - BA) or projection (what BA cannot reach)"
    )
    split: str = option("0", "directions of W that the start keeps before quantizing: a number, or auto")
    damping: float = option(0.03, "added to the second moment, in parts of its mean diagonal")
    rotate: bool = option(False, "rotate the inputs of every linear layer (randomized Hadamard), at run time")
    refine: int = option(0, "steps that tune the start of the finished base against the 16-bit model, on calibrate")
    refine_rate: float = option(1e-3, "peak learning rate of refine, relative to scales and norms")
    refine_against: str = option(
        "text", "what refine compares next tokens with: the text, or the teacher (the 16-bit model's own guess)"
    )
    refine_parts: tuple[str, ...] = option(
        ("start",), "what refine tunes: start, scales, norms, codes; repeat for more"
    )
    target: tuple[str, ...] = option((), "quantize only linears whose name matches one of these shell patterns")
    skip: tuple[str, ...] = option((), "leave linears whose name matches one of these shell patterns in 16 bit")
    embeddings: bool = option(False, "quantize token tables too; with a tied head, head must be given as well")
    head: bool = option(False, "quantize the output head too; with a tied table, embeddings must be given as well")
    start_format: str = option("lm4:64", "number format in which the start's factors are stored")
    seed: int = option(0, "seed of the randomized SVD")

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", steps_of(self.steps))
        for name in ("rank_for", "alpha_for", "rules", "target", "skip", "refine_parts"):
            object.__setattr__(self, name, patterns(name, getattr(self, name)))
        self._take_rest()
        self._check_calibration()
        for text in (self.format, self.start_format, *(split_rule("rules", rule)[1] for rule in self.rules)):
            Format.parse(text)
        require(
            not Format.parse(self.start_format).by_column,
            f"start_format is {self.start_format}, whose codes lie by column; use one such as lm4:64 or int8:row.",
        )
        require_choices(solver=(self.solver, SOLVERS))
        require(self.rank >= 0, f"rank is {self.rank}; use 0 or more.")
        require(self.alpha is None or self.alpha > 0, f"alpha is {self.alpha}; use a positive number.")
        for rule in self.rank_for:
            require(number_rule("rank_for", rule) % 1 == 0, f"rank_for {rule!r}: use a whole number.")
        for rule in self.alpha_for:
            require(number_rule("alpha_for", rule) > 0, f"alpha_for {rule!r}: use a positive number.")
        first_layers_of(self.first_layers)
        require_positive(self, "target_bits")
        fixed = [name for name in ("rules", "first_layers") if getattr(self, name)]
        require(
            self.target_bits is None or not fixed,
            f"target_bits chooses the format of every matrix, and {' and '.join(fixed)} too; leave one of them out.",
        )
        require(
            self.check_text is None or self.target_bits is not None,
            "check_text compares the widths that target_bits chose; give target_bits too or leave check_text out.",
        )

    def recorded(self) -> "QuantizeOptions":
        """What a base's config says of these options: texts by name, nothing of where they lay on this machine."""
        text = self.calibrate and self.calibrate.replace("\\", "/").rpartition("/")[2]
        return replace(self, calibrate=text, statistics=None)

    def _check_calibration(self) -> None:
        require_choices(
            metric=(self.metric, METRICS), feedback=(self.feedback, FEEDBACK), variant=(self.variant, VARIANTS)
        )
        require_positive(self, "samples", "damping")
        require(self.calibrate_length >= 2, f"calibrate_length is {self.calibrate_length}; use 2 tokens or more.")
        require(
            not (self.rotate and self.solver == "qalora"),
            "qalora merges adapters by groups of inputs, which rotate mixes; leave one of them out.",
        )
        require(
            not self.fisher or (self.solver == "calibrated" and self.metric != "none"),
            "fisher weighs the errors of the solver calibrated on a text; use that solver, or leave fisher out.",
        )
        require(self.sweeps >= 0, f"sweeps is {self.sweeps}; use 0 or more.")
        require(self.rounds >= 1, f"rounds is {self.rounds}; use 1 or more.")
        require(self.split == "auto" or self.split.isdecimal(), f"split is {self.split!r}; use a number or auto.")
        require(
            self.calibrate is None or self.solver == "calibrated" or self.refine > 0,
            f"calibrate is for the solver calibrated or for refine, and the solver is {self.solver}; leave it out.",
        )
        require(self.refine >= 0, f"refine is {self.refine}; use 0 (none) or more steps.")
        require(not self.refine or self.calibrate is not None, "refine tunes on a text; give calibrate too.")
        require_positive(self, "refine_rate")
        require_choices(refine_against=(self.refine_against, AGAINST))
        for part in self.refine_parts:
            require_choices(refine_parts=(part, PARTS))

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
