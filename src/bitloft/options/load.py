"""How a server is put under load."""

import os
from dataclasses import dataclass, field
from math import isfinite

from bitloft.options.fields import option, require, require_positive
from bitloft.options.generate import KEY_VARIABLE


@dataclass(frozen=True)
class LoadOptions:
    """How a server is put under load and what counts as a good answer."""

    requests: int = option(200, "requests to send")
    clients: int = option(16, "clients that ask one after the other (without rate)")
    rate: float | None = option(None, "requests per second that arrive at random times, however many are under way")
    adapters: int | None = option(None, "adapters to ask (default: all that the server lists)")
    zipf: float = option(1.0, "exponent of the adapters' popularity; 0 asks all alike")
    base_share: float = option(0.1, "share of the requests that ask the base")
    prompts: int = option(4, "different prompts; each pair of adapter and prompt is asked alone once beforehand")
    words: int = option(24, "words of a prompt; the first half is the same in all")
    max_tokens: int = option(32, "tokens of an answer")
    whole: float = option(0.2, "share of the requests whose answer is not streamed")
    check: bool = option(True, "compare every answer with the one that was given alone")
    slo_first_ms: float | None = option(None, "goodput counts answers whose first token came within this time")
    slo_token_ms: float | None = option(None, "goodput counts answers whose further tokens took this time at most")
    timeout: float = option(120.0, "seconds after which a client gives up")
    seed: int = option(0, "seed of adapters, prompts and arrivals")
    allow_remote: bool = option(False, "put a server on another machine under load; it must be yours")
    api_key: str | None = field(
        default=None, repr=False, metadata={"help": f"key of the server (default: {KEY_VARIABLE}, if set)"}
    )

    def __post_init__(self) -> None:
        names = ("requests", "clients", "rate", "adapters", "prompts", "words", "max_tokens", "timeout")
        require_positive(self, *names, "slo_first_ms", "slo_token_ms")
        require(isfinite(self.zipf) and 0 <= self.zipf <= 10, f"zipf is {self.zipf}; use 0 to 10.")
        for name in ("base_share", "whole"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"{name} is {share}; use a share from 0 to 1.")

    @property
    def key(self) -> str | None:
        """The key to send, None for none: the option, else the environment's."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None
