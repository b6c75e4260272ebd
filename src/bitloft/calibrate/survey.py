"""What a text says about every matrix of the 16-bit model, block by block, before anything is quantized.

``target_bits`` asks it: widths are chosen before a block is quantized, so their errors are counted under the inputs
that the 16-bit model has. One block, its statistics and the text's activations are in memory, as in a calibrated run.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bitloft.calibrate.gradients import output_weights
from bitloft.calibrate.run import Known, text_identity, walker_of
from bitloft.calibrate.statistics import Gatherer, Saved
from bitloft.calibrate.text import read_batches
from bitloft.integrations.body import Body
from bitloft.integrations.source import Source
from bitloft.options import QuantizeOptions
from bitloft.solvers import Statistics

# called with the names of the modules of a block, and what is known of their matrices
Each = Callable[[list[str], Known], None]


def survey(source: Source, options: QuantizeOptions, kinds: Mapping[str, str], each: Each) -> None:
    """Call ``each`` for every block, then for what is outside of blocks; ``kinds``: chosen module -> its kind.

    With ``options.statistics`` the gradients of ``fisher`` are kept there, where the run finds them. Raises as
    ``run.run_calibrated`` does.
    """
    identity = text_identity(source, options)
    with torch.no_grad():
        body = Body(source)
        batches = read_batches(
            str(options.calibrate), body.model, source.tokenizer,
            samples=options.samples, length=options.calibrate_length,
        )  # fmt: skip
        rows: Mapping[str, torch.Tensor] = {}
        if options.fisher and options.statistics:
            rows = Saved(Path(options.statistics), identity).gradients(lambda: output_weights(source, batches))
        elif options.fisher:
            rows = output_weights(source, batches)
        walker, stacks, _ = walker_of(body, batches)

        def measured(names: list[str], run: Callable[[Callable[[int], None]], None]) -> None:
            gatherer = Gatherer(body.model, {name: kinds[name] for name in names})
            with gatherer.hooked():
                run(lambda number: gatherer.begin(batches[number].masks))
            found: dict[str, Statistics] = gatherer.statistics()
            each(names, Known(found, rows))

        for stack in stacks:
            walker.capture(batches, stack)
            for at, block in enumerate(stack.blocks):
                body.fill([] if body.resident else body.within(block))
                measured(_within(kinds, (f"{block}.",)), lambda begin, at=at: walker.gather(at, begin))  # type: ignore[misc]
                walker.advance(at)
                body.drop(block)
        inside = tuple(f"{block}." for stack in stacks for block in stack.blocks)
        outside = [name for name in kinds if not name.startswith(inside)]
        if outside:
            measured(outside, lambda begin: walker.finish(batches, begin))


def _within(kinds: Mapping[str, str], prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in kinds if name.startswith(prefixes)]
