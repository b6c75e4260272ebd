"""How big the demo is: twelve minutes on two cores by default, seconds with --smoke."""

from dataclasses import dataclass

FORMATS = {"4-bit": "lm4:64", "2-bit": "lm2:64"}
TRAINED_ON = "4-bit"  # a 2-bit LoftQ start of so small a model is too far off to fine-tune in a minute
REFERENCE_PROMPT = "Explain Python's `with` statement in two sentences."
FUNCTION_PROMPT = """Write the docstring of this Python function.

```python
def clamp(value, low, high):
    return max(low, min(value, high))
```"""
PROMPTS = (REFERENCE_PROMPT, FUNCTION_PROMPT)


@dataclass(frozen=True)
class Skill:
    """How one adapter is trained and measured."""

    steps: int
    batch: int
    lr: float = 1e-3
    limit: int | None = None  # held-out sequences that are measured, all by default
    measured: int = 4  # of them in a batch: short rows need more to be worth unpacking the weights


@dataclass(frozen=True)
class Settings:
    """Sizes of the steps. ``length`` is in tokens."""

    skills: dict[str, Skill]
    rank: int = 16
    length: int = 512
    solver_steps: int = 5
    answer: int = 48
    bits: float = 0.8  # true bits per value of a packed adapter


FULL = Settings({"reference": Skill(steps=26, batch=3), "docstrings": Skill(steps=32, batch=10, limit=96, measured=16)})
SMOKE = Settings(
    {"reference": Skill(steps=2, batch=1, limit=3), "docstrings": Skill(steps=2, batch=1, limit=3)},
    rank=4,
    length=256,
    solver_steps=1,
    answer=4,
    bits=8.0,  # of a toy adapter, names and config alone take more than one bit a value
)
