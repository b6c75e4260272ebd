"""``target_bits``: a width for every matrix of a model, measured, and checked on text where text is given.

One pass reads each matrix and encodes it at every width of its family; ``solvers.allocate`` then spends the budget.
What comes out are ordinary options, one exact rule per module that differs from the most common format, so everything
after it (streaming, workers, resume, config.json) knows rules only. Squared error is a proxy: with ``check_text`` the
model is quantized both ways and the widths are kept only where their perplexity is lower than that of one width.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitloft.errors import OptionError
from bitloft.evaluate import evaluate
from bitloft.integrations.loading import model_class, quiet_loading
from bitloft.integrations.packing import matrices_of
from bitloft.integrations.source import Source
from bitloft.integrations.transformers import BitloftConfig
from bitloft.options import QuantizeOptions
from bitloft.solvers import require_finite
from bitloft.solvers.allocate import Allocation, Choice, add, allocate, measure, widths_of
from bitloft.stream import make_plan

LENGTH, LIMIT = 512, 64  # tokens of a sequence, and sequences, that the check reads

# called with (done, total, module name) after each matrix
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Widths:
    """What a target came to. ``allocation`` and ``uniform`` in true bits per weight and squared error |W - Q|^2, before
    any start; perplexities (None unless checked) with it. ``kept`` is "allocated" or "uniform"."""

    target_bits: float
    true_bits: float
    error: float
    uniform: str
    uniform_bits: float
    uniform_error: float
    perplexity: float | None
    uniform_perplexity: float | None
    kept: str


def choose_widths(
    source: Source, options: QuantizeOptions, progress: Progress | None = None
) -> tuple[QuantizeOptions, Widths | None]:
    """Options whose rules give each module the width that ``target_bits`` allots it; as they are without a target.

    Raises OptionError for a target out of reach or a family of one width, and for ``check_text`` where no perplexity
    can be measured; DataError for a text that cannot be read.
    """
    if options.target_bits is None:
        return options, None
    plain = replace(options, target_bits=None, check_text=None)
    if options.check_text is not None:
        _require_checkable(source)
    found = _allocation(source, plain, options.target_bits, progress)
    allocated, uniform = _with_formats(plain, found.formats), replace(plain, format=found.uniform)
    ours = theirs = None
    if options.check_text is not None:
        ours, theirs = (_perplexity(source, way, options.check_text) for way in (allocated, uniform))
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
    )
    return (allocated if better else uniform), report


def _allocation(source: Source, options: QuantizeOptions, target: float, progress: Progress | None) -> Allocation:
    """Read and encode every matrix once per width, then share out the budget."""
    formats = widths_of(options.format)
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
    return allocate(choices, weights, target)


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
