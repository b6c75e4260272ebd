"""``target_bits``: a width for every matrix of a model, measured, and checked on text where text is given.

One pass reads each matrix and encodes it at every width of its family; ``solvers.allocate`` then spends the budget.
What comes out are ordinary options, one exact rule per module that differs from the most common format, so everything
after it (streaming, workers, resume, config.json) knows rules only. Squared error is a proxy: with ``check_text`` the
model is quantized both ways and the widths are kept only where their perplexity is lower than that of one width.

The calibrated solver's error is counted where the inputs are and after its start, by one round of it at every width
(``calibrate.survey``): with ``fisher`` as what it adds to the loss, else relative to the output, every matrix alike.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bitloft.calibrate.run import Known
from bitloft.calibrate.survey import survey
from bitloft.checkpoint import read_json
from bitloft.errors import OptionError
from bitloft.evaluate import evaluate
from bitloft.integrations.loading import model_class, quiet_loading
from bitloft.integrations.packing import matrices_of
from bitloft.integrations.source import Source
from bitloft.integrations.transformers import BitloftConfig
from bitloft.kernels.ops import decode
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan
from bitloft.solvers import Statistics, require_finite, solve
from bitloft.solvers.allocate import Choice, add, allocate, measure, stored_bytes, widths_of
from bitloft.solvers.rotation import rotated, rotated_moment
from bitloft.stream import make_plan

LENGTH, LIMIT = 512, 64  # tokens of a sequence, and sequences, that the check reads

# called with (done, total, module name) after each matrix
Progress = Callable[[int, int, str], None]
Trial = Callable[[QuantizeOptions, str], float]  # the perplexity of a way to quantize, on a text
Measured = tuple[dict[str, tuple[Choice, ...]], int]  # choices by module, and how many weights they are


@dataclass(frozen=True)
class Widths:
    """What a target came to. ``allocation`` and ``uniform`` in true bits per weight and error: ``counted`` as
    "weights", |W - Q|^2 before any start; "outputs", sum of |E x|^2 / |W x|^2 with it; or "loss", sum of
    fisher-weighed |E x|^2. Perplexities (None unless checked) are with the start. ``kept`` is "allocated" or "uniform".
    """

    target_bits: float
    true_bits: float
    error: float
    uniform: str
    uniform_bits: float
    uniform_error: float
    perplexity: float | None
    uniform_perplexity: float | None
    kept: str
    counted: str = "weights"


def choose_widths(
    source: Source, options: QuantizeOptions, progress: Progress | None = None, trial: Trial | None = None
) -> tuple[QuantizeOptions, Widths | None]:
    """Options whose rules give each module the width that ``target_bits`` allots it; as they are without a target.

    ``trial`` measures a way to quantize that cannot be had while a model is loaded, such as a calibrated one.
    Raises OptionError for a target out of reach or a family of one width, and for ``check_text`` where no perplexity
    can be measured; DataError for a text that cannot be read.
    """
    if options.target_bits is None:
        return options, None
    plain = replace(options, target_bits=None, check_text=None)
    if options.check_text is not None:
        _require_checkable(source)
    calibrated = options.solver == "calibrated" and options.metric != "none"
    measured = _surveyed if calibrated else _encoded
    found = allocate(*measured(source, plain, widths_of(options.format), progress), options.target_bits)
    allocated, uniform = _with_formats(plain, found.formats), replace(plain, format=found.uniform)
    ours = theirs = None
    if options.check_text is not None:
        ways = (allocated, uniform)
        if calibrated and trial is not None:
            ours, theirs = (trial(way, options.check_text) for way in ways)
        else:
            ours, theirs = (_perplexity(source, way, options.check_text) for way in ways)
    better = ours is None or theirs is None or ours < theirs
    report = Widths(
        target_bits=options.target_bits,
        true_bits=found.true_bits,
        error=found.error,
        uniform=found.uniform,
        uniform_bits=found.uniform_bits,
        uniform_error=found.uniform_error,
        perplexity=ours,
        uniform_perplexity=theirs,
        kept="allocated" if better else "uniform",
        counted=("loss" if options.fisher else "outputs") if calibrated else "weights",
    )
    return (allocated if better else uniform), report


def _encoded(source: Source, options: QuantizeOptions, formats: tuple[str, ...], progress: Progress | None) -> Measured:
    """Read and encode every matrix once per width."""
    plan = make_plan(source, options)
    kinds = {name: stored.kind for name, stored in plan.quantizer.quantization_config.stored().items()}
    choices: dict[str, tuple[Choice, ...]] = {}
    weights, total = 0, len(plan.matrices)
    for step in plan.steps.values():
        names = {matrix.target: matrix.name for matrix in step.matrices}
        for target_name, weight in step.reading.read(plan.skeleton.tensors, plan.skeleton.model):
            name = names.get(target_name)
            if name is None:
                continue
            for _, matrix in matrices_of(plan.skeleton.model, name, kinds[name], weight):
                require_finite(name, matrix)
                measured = measure(matrix.float(), formats)
                choices[name] = add(choices[name], measured) if name in choices else measured
                weights += matrix.numel()
            if progress is not None:
                progress(len(choices), total, f"{name}, at {len(formats)} widths")
    return choices, weights


def _surveyed(
    source: Source, options: QuantizeOptions, formats: tuple[str, ...], progress: Progress | None
) -> Measured:
    """Solve every matrix once per width, in one round, under the inputs that it has in the 16-bit model."""
    plan = make_plan(source, options)
    model, quick = plan.skeleton.model, replace(options, rounds=1, sweeps=0, split="0")
    kinds = {name: stored.kind for name, stored in plan.quantizer.quantization_config.stored().items()}
    steps = {matrix.name: step for step in plan.steps.values() for matrix in step.matrices}
    choices: dict[str, tuple[Choice, ...]] = {}
    weights = 0

    def each(names: list[str], known: Known) -> None:
        nonlocal weights
        for step in {id(steps[name]): steps[name] for name in names}.values():
            owners = {matrix.target: matrix.name for matrix in step.matrices}
            for target, weight in step.reading.read(plan.skeleton.tensors, model):
                name = owners.get(target)
                if name is None:
                    continue
                for path, matrix in matrices_of(model, name, kinds[name], weight):
                    ways = [replace(plan.quantizer.plans[name], format=fmt) for fmt in formats]
                    found = tuple(_solved(path, matrix.float(), way, quick, known.get(path)) for way in ways)
                    choices[name] = add(choices[name], found) if name in choices else found
                    weights += matrix.numel()
                if progress is not None:
                    progress(len(choices), len(steps), f"{name}, calibrated at {len(formats)} widths")

    survey(source, options, kinds, each)
    return choices, weights


def _solved(name: str, weight: Tensor, plan: ModulePlan, options: QuantizeOptions, known: Statistics) -> Choice:
    """Bytes of the codes, and the error that is left with the start."""
    solution = solve(name, weight, plan, options, known)
    dense = decode(solution.weight)
    dense = dense if solution.start is None else dense + solution.start.product()
    weight = rotated(weight) if plan.rotated else weight
    moment = known.moment if known.moment is None or not plan.rotated else rotated_moment(known.moment)

    def power(rows: Tensor) -> Tensor:
        return (rows * (rows if moment is None else rows @ moment)).sum(1).double()

    error, whole = power(weight - dense), power(weight)
    relative = error.sum() / whole.sum().clamp_min(1e-30)
    found = relative if known.rows is None else (error * known.rows.double()).sum()
    return Choice(plan.format, stored_bytes(tuple(weight.shape), plan.format), float(found))


def _with_formats(options: QuantizeOptions, formats: dict[str, str]) -> QuantizeOptions:
    """The most common format for all, an exact rule for each other; longer names first, since a rule also matches
    longer paths that end in its name."""
    usual = Counter(formats.values()).most_common(1)[0][0]
    others = {name for name, fmt in formats.items() if fmt != usual}
    longer = {name for name in formats if any(name.endswith(f".{other}") for other in others)}
    named = sorted(others | longer, key=lambda name: (-len(name), name))
    return replace(options, format=usual, rules=tuple(f"{name}={formats[name]}" for name in named))


def _require_checkable(source: Source) -> None:
    """Raise OptionError unless the model has a perplexity and can be quantized as it is loaded."""
    if source.gguf:
        raise OptionError("check_text quantizes a model folder both ways; a GGUF file cannot be checked, leave it out.")
    name = (source.config().get("architectures") or ["a model of no known class"])[0]
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise OptionError(f"check_text measures a decoder's perplexity, which {name} does not have; leave it out.")


def perplexity_of(base: Path, text: str) -> float:
    """Of a finished base, as ``check_text`` measures."""
    limit = read_json(base / "config.json").get("max_position_embeddings") or LENGTH
    return evaluate(base, Path(text), length=min(LENGTH, limit), limit=LIMIT).perplexity


def _perplexity(source: Source, options: QuantizeOptions, text: str) -> float:
    """Of the model as it is quantized by ``options``, start included, on the beginning of ``text``."""
    kind = model_class(source.config(), source.name)
    with quiet_loading():
        model = kind.from_pretrained(
            source.whole(), quantization_config=BitloftConfig(options), dtype=torch.float32, use_safetensors=True
        )
    limit = getattr(model.config, "max_position_embeddings", None) or LENGTH
    found = evaluate(model, Path(text), tokenizer=source.tokenizer, length=min(LENGTH, limit), limit=LIMIT)
    return found.perplexity
