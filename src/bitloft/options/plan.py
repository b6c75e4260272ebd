"""What a job is planned for: the base, the adapters, the training, the requests."""

from dataclasses import dataclass
from math import isfinite

from bitloft.formats import Format
from bitloft.options.fields import DTYPES, option, require, require_choices, require_positive
from bitloft.options.quantize import QuantizeOptions

ROUTERS = ("rendezvous", "random")
PLANNED = ("loftq", "qlora", "qalora", "calibrated")


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of a machine. Names that ``quantize``, ``train`` and ``compress`` have mean the same here."""

    format: str = option("lm4:64", "number format of the base's weights")
    solver: str = option("loftq", "loftq, qlora, qalora or calibrated, as for quantize")
    rank: int = option(16, "rank of the base's start")
    steps: int = option(5, "LoftQ alternations")
    rules: tuple[str, ...] = option((), "PATTERN=FORMAT: another format for the matching modules; repeat for more")
    start_format: str = option("lm4:64", "number format in which the start's factors are stored")
    samples: int = option(128, "sequences of the text that the solver calibrated measures")
    calibrate_length: int = option(512, "tokens of such a sequence")
    threads: int = option(1, "threads of a quantizing process")
    jobs: int = option(1, "quantizing processes at once on a machine")
    adapter_rank: int = option(16, "rank of an adapter, on every packed linear")
    adapter_bits: float = option(0.8, "true bits of a packed adapter per trained value")
    adapters: int = option(1000, "adapters that are served")
    train_steps: int = option(1000, "optimizer steps that an adapter is trained for")
    batch: int = option(4, "sequences in a training batch")
    accumulate: int = option(1, "batches in an optimizer step")
    length: int = option(512, "tokens of a training sequence")
    dtype: str = option("float32", "float32 or bfloat16, what training computes in")
    requests: float = option(1.0, "requests a second")
    prompt: int = option(256, "tokens of a prompt")
    answer: int = option(128, "tokens of an answer")
    concurrency: int = option(8, "requests that a replica computes at once")
    utilisation: float = option(0.7, "share of its throughput that a replica is loaded to")
    adapter_budget: str | None = option(
        None, "memory for adapters on a replica, such as 4GB (default: half of what base and caches leave)"
    )
    zipf: float = option(1.0, "exponent of the adapters' popularity, share ~ 1 / place**zipf; 0: all alike")
    router: str = option("rendezvous", "rendezvous (an adapter has a home replica) or random")
    played: int = option(100000, "requests that the simulation plays")
    seed: int = option(0, "seed of the simulation")

    def __post_init__(self) -> None:
        require_choices(router=(self.router, ROUTERS), solver=(self.solver, PLANNED), dtype=(self.dtype, DTYPES[1:]))
        require_positive(
            self, "threads", "jobs", "adapter_rank", "adapter_bits", "adapters", "train_steps", "batch", "accumulate",
            "length", "samples", "calibrate_length",
            "requests", "prompt", "answer", "concurrency", "utilisation", "played", "steps",
        )  # fmt: skip
        require(self.utilisation <= 1, f"utilisation is {self.utilisation}; use a share up to 1.")
        require(isfinite(self.zipf) and 0 <= self.zipf < 10, f"zipf is {self.zipf}; use 0 to 10.")
        Format.parse(self.format)
        self.quantizing()

    def quantizing(self) -> QuantizeOptions:
        """The options of the quantize verb that the plan is about."""
        return QuantizeOptions(
            format=self.format, solver=self.solver, rank=self.rank, steps=self.steps, rules=self.rules,
            start_format=self.start_format,
        )  # fmt: skip
