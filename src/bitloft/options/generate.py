"""How prompts are answered: by a command or by a server."""

import os
import re
from dataclasses import dataclass, field
from math import isfinite

from bitloft.options.fields import (
    activations,
    base_mismatch,
    option,
    require,
    require_activations,
    require_mismatch,
    require_positive,
)


@dataclass(frozen=True)
class GenerateOptions:
    """How prompts are answered."""

    max_tokens: int = option(128, "tokens of an answer at most")
    temperature: float = option(0.0, "0 takes the likeliest token; higher values sample")
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this share of the probability")
    seed: int = option(0, "seed of the sampling")
    raw: bool = option(False, "continue the prompt as it is, without the chat template")
    base_mismatch: str | None = base_mismatch()
    activations: str | None = activations()

    def __post_init__(self) -> None:
        require_mismatch(self.base_mismatch)
        require_activations(self.activations)
        require_positive(self, "max_tokens", "top_p")
        require(
            isfinite(self.temperature) and self.temperature >= 0, f"temperature is {self.temperature}; use 0 or more."
        )
        require(self.top_p <= 1, f"top_p is {self.top_p}; use a share above 0 and up to 1.")


_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)B?", re.IGNORECASE)


def bytes_of(size: str | None) -> int | None:
    """The bytes that a text such as "512M", "2GB" or "100000" means, in units of 1024; None stays None.

    Raises OptionError for anything else, and for nothing at all.
    """
    if size is None:
        return None
    match = _SIZE.fullmatch(size.strip())
    found = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    require(found > 0, f"{size!r} is not a size; write bytes or a number with K, M, G or T, such as 512M.")
    return found


LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "BITLOFT_API_KEY"
ADMIN_KEY_VARIABLE = "BITLOFT_ADMIN_KEY"


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
    admin: bool = option(False, "add, replace and remove adapters over HTTP while serving; needs a key of its own")
    admin_key: str | None = field(
        default=None, repr=False, metadata={"help": f"key of the admin routes (default: {ADMIN_KEY_VARIABLE}, if set)"}
    )
    page: bool = option(True, "a page at / that shows load and adapters and compares two of them")
    max_batch: int = option(32, "requests that are computed at the same time")
    max_queue: int = option(256, "requests that may wait; more are refused with status 429")
    step_tokens: int = option(128, "tokens of one step at most: longer prompts are read in pieces, beside who answers")
    adapter_budget: str | None = option(
        None,
        "bytes of adapters in memory, such as 512M or 2G; the others are read when they are asked for (default: all)",
    )
    adapter_share: float = option(0.25, "share of the queue that one adapter may hold once half of it is taken")
    max_wait: float = option(10.0, "seconds after which a waiting request goes first, whatever its adapter was served")
    pack_plain: float | None = option(None, "true bits to pack plain adapters to while they are loaded (default: not)")
    batch_invariant: bool = option(False, "answers do not depend, to the last bit, on what is computed beside them")
    cache_budget: str | None = option(
        None, "bytes for keys and values, such as 4G (default: half of the memory that is free at the start)"
    )
    context: int | None = option(None, "tokens of prompt and answer together (default: the model's own limit)")
    max_tokens: int = option(1024, "tokens of an answer that a request may ask for")
    queue_seconds: float = option(30.0, "a request that waited longer is refused with status 503")
    request_seconds: float = option(600.0, "a request that takes longer ends with an error")
    drain_seconds: float = option(30.0, "time that running requests have to end after SIGTERM")
    base_mismatch: str | None = base_mismatch()
    activations: str | None = activations()

    def __post_init__(self) -> None:
        require_mismatch(self.base_mismatch)
        require_activations(self.activations)
        require_positive(self, "max_batch", "max_queue", "context", "max_tokens", "queue_seconds", "request_seconds")
        require_positive(self, "step_tokens", "adapter_share", "max_wait", "pack_plain")
        require(self.adapter_share <= 1, f"adapter_share is {self.adapter_share}; use a share above 0 and up to 1.")
        bytes_of(self.adapter_budget)
        bytes_of(self.cache_budget)
        require(0 <= self.port < 1 << 16, f"port is {self.port}; use 0 to 65535.")
        require(
            isfinite(self.drain_seconds) and self.drain_seconds >= 0,
            f"drain_seconds is {self.drain_seconds}; use 0 or more.",
        )
        require(
            not self.admin or self.admin_secret is not None,
            f"admin needs a key of its own; set admin_key or {ADMIN_KEY_VARIABLE}.",
        )
        require(
            self.admin_secret is None or self.admin_secret != self.key,
            "admin_key and api_key are the same; every client could change what is served. Give two keys.",
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

    @property
    def admin_secret(self) -> str | None:
        """The key of the admin routes, None where they are off."""
        return (self.admin_key or os.environ.get(ADMIN_KEY_VARIABLE) or None) if self.admin else None
