"""What the full-precision model makes of some sequences, on disk: it is asked once, block by block, and then gone.

One file of ``work`` holds the last hidden states of AT_ONCE sequences in bfloat16. Its name tells the sequences that it
is for: states of another text or seed are never taken for these, and a resumed run asks only for what is missing.
The alternative, both models in memory and a forward of each per step, holds the 16-bit model beside the packed one.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import BFloat16, Int
from torch import Tensor, nn

from bitloft.calibrate.blocks import stacks_of
from bitloft.checkpoint import read_header, read_tensors, replace_tensors
from bitloft.integrations.body import Body
from bitloft.integrations.source import Source
from bitloft.tasks.precision import choose_precision

AT_ONCE = 32  # sequences of one forward of the teacher, which reads the whole model from its files


@dataclass(frozen=True)
class Teacher:
    """The full-precision model without its head, in float32. A block's weights are read when its forward begins and
    dropped when it ends; ``held`` says what is in memory (all of a model whose class names no blocks)."""

    model: nn.Module
    held: str

    @classmethod
    def open(cls, source: Source) -> "Teacher":
        """Raises CheckpointError where files and config disagree, OptionError for an unknown architecture."""
        body = Body(source)
        blocks = [block for stack in stacks_of(body.model) for block in stack.blocks]
        body.fill_all_but(blocks)
        for block in blocks:
            module = body.model.get_submodule(block)
            module.register_forward_pre_hook(lambda *_, block=block: body.fill(body.within(block)))
            module.register_forward_hook(lambda *_, block=block: body.drop(block))
        held = f"one of {len(blocks)} blocks" if blocks else "the whole model (its class names no blocks)"
        return cls(body.model.base_model, held)


@dataclass(frozen=True)
class TeacherStates:
    """Sequences of one length, and where their states are; ``held`` says what of the teacher was in memory."""

    ids: Int[Tensor, "sequences length"]
    files: tuple[Path, ...]
    held: str

    @classmethod
    def ask(
        cls,
        source: Source,
        ids: Int[Tensor, "sequences length"],
        work: Path,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> "TeacherStates":
        """Forwards of ``source`` for the sequences whose states ``work`` does not hold yet."""
        text = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
        files = tuple(work / f"teacher-{text}-{i:05}.safetensors" for i in range(0, len(ids), AT_ONCE))
        teacher: Teacher | None = None
        for done, (file, batch) in enumerate(zip(files, ids.split(AT_ONCE), strict=True)):
            if file.is_file():
                continue
            teacher = teacher or Teacher.open(source)
            with torch.no_grad(), choose_precision("auto", batch.device).autocast(batch.device):
                states = teacher.model(input_ids=batch)[0].bfloat16().contiguous()
            replace_tensors(file, {"states": states}, {"held": teacher.held})
            if progress is not None:
                progress(done + 1, len(files), f"asking the teacher, {teacher.held} in memory")
        return cls(ids, files, read_header(files[0])["__metadata__"]["held"])

    def batch(
        self, chosen: Sequence[int]
    ) -> tuple[Int[Tensor, "batch length"], BFloat16[Tensor, "batch length width"]]:
        """Some sequences with their states."""
        read = {number: read_tensors(self.files[number])["states"] for number in {i // AT_ONCE for i in chosen}}
        return self.ids[list(chosen)], torch.stack([read[i // AT_ONCE][i % AT_ONCE] for i in chosen])
