"""How an adapter is trained, and how held-out loss is measured."""

from dataclasses import dataclass

from bitloft.options.fields import (
    DTYPES,
    activations,
    base_mismatch,
    option,
    require,
    require_activations,
    require_choices,
    require_mismatch,
    require_positive,
)

STARTS = ("frozen", "trainable")
SCHEDULES = ("cosine", "linear", "constant")


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
    weight_decay: float = option(0.0, "AdamW's weight decay")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises")
    batch: int = option(4, "sequences in a batch, of each process where there are several")
    accumulate: int = option(1, "batches in an optimizer step")
    length: int = option(512, "tokens of a sequence; documents are cut into such blocks, longer rows lose their end")
    seed: int = option(0, "seed of the adapter's beginning, the order of the data and dropout")
    dtype: str = option("auto", "bfloat16 (autocast), float32, or auto: bfloat16 where the processor computes in it")
    shard: bool = option(
        False, "several processes: each holds a part of base, adapter and optimizer (FSDP2), not a copy (DDP)"
    )
    save_every: int = option(50, "steps between checkpoints to resume from; 0 writes none")
    log_every: int = option(5, "steps over which a logged loss is averaged")
    resume: bool = option(False, "go on from the last checkpoint of an interrupted run with the same settings")

    def __post_init__(self) -> None:
        require_choices(start=(self.start, STARTS), schedule=(self.schedule, SCHEDULES), dtype=(self.dtype, DTYPES))
        frozen = self.start == "frozen"
        for name in ("rank", "alpha", "rslora", "target"):
            given = getattr(self, name) not in (None, False, ())
            require(frozen or not given, f"{name} is fixed by the base where its start is trained; leave {name} out.")
        require_positive(self, "rank", "alpha", "epochs", "steps", "lr", "batch", "accumulate", "log_every")
        require(self.length >= 2, f"length is {self.length}; use 2 or more.")
        require(self.save_every >= 0, f"save_every is {self.save_every}; use 0 (no checkpoints) or more.")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; use 0 or more.")
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
    base_mismatch: str | None = base_mismatch()
    activations: str | None = activations()

    def __post_init__(self) -> None:
        require_mismatch(self.base_mismatch)
        require_activations(self.activations)
        require_choices(dtype=(self.dtype, DTYPES))
        require_positive(self, "limit", "batch")
        require(self.length >= 2, f"length is {self.length}; use 2 or more.")
