"""vLLM: packed adapters by name, through its LoRA resolver interface; entry point ``bitloft`` of vllm.general_plugins.

    request for model "billing"  ->  BITLOFT_VLLM_ADAPTERS/billing, verified  ->  CACHE/billing@<sha12>, a 16-bit LoRA

vLLM computes with adapters in 16 bit and knows nothing of packed ones, so a bundle is expanded once per version, when
it is first asked for. The version is in the directory, in the name and in the integer id that vLLM keys its caches by:
a bundle that is replaced under its name can never be answered from the old one's memory. vLLM's own filesystem resolver
compares the base by the name in a config; here the bundle's fingerprint must be that of the base.

Settings are environment variables, as vLLM's plugins have no other: BITLOFT_VLLM_ADAPTERS (directory of bundles;
without it the plugin does nothing), BITLOFT_VLLM_BASE (the packed base that vLLM's model was exported from, its
fingerprint, or ``any``), BITLOFT_VLLM_START (the start as a LoRA, where the export has no place for it: bitsandbytes
and gptq; it is joined to each adapter), BITLOFT_VLLM_CACHE (where expanded adapters go; in memory is best).
"""

import asyncio
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bitloft.adapters import WEIGHTS_FILE, is_packed, read_packed
from bitloft.checkpoint import writing
from bitloft.errors import AdapterError, BitloftError, OptionError
from bitloft.factors import Pair, read_factors, stacked, write_lora
from bitloft.integrations.record import base_record

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DIGITS = 12  # of a version's sum, in names
ANY = "any"

log = logging.getLogger("bitloft")


@dataclass(frozen=True)
class Expanded:
    """An adapter as vLLM takes it: a name with the version in it, an integer that no other version has, a directory."""

    name: str
    number: int
    path: Path
    rank: int


@dataclass(frozen=True)
class Bundles:
    """The packed adapters of ``directory`` for the base of ``fingerprint`` (None: any), expanded into ``cache``."""

    directory: Path
    cache: Path
    fingerprint: str | None
    start: Path | None = None

    @classmethod
    def from_environment(cls) -> "Bundles | None":
        """What the environment asks for, None where it names no directory. Raises OptionError for what is missing."""
        directory, base = os.environ.get("BITLOFT_VLLM_ADAPTERS"), os.environ.get("BITLOFT_VLLM_BASE")
        if not directory:
            return None
        if not Path(directory).is_dir():
            raise OptionError(f"BITLOFT_VLLM_ADAPTERS is {directory}, which is no directory; name that of the bundles.")
        if not base:
            raise OptionError(
                "BITLOFT_VLLM_BASE is not set; give the packed base that vLLM's model was exported from, its "
                f"fingerprint, or {ANY} to take adapters of any base."
            )
        known = re.fullmatch(r"[0-9a-f]{64}", base) is not None
        fingerprint = None if base == ANY else base if known else base_record(base).fingerprint
        cache = os.environ.get("BITLOFT_VLLM_CACHE") or tempfile.mkdtemp(prefix="bitloft-vllm-")
        start = os.environ.get("BITLOFT_VLLM_START")
        return cls(Path(directory), Path(cache), fingerprint, Path(start) if start else None)

    def find(self, name: str) -> Expanded | None:
        """The newest version of an adapter, expanded; None where there is none of that name.

        ``name`` may carry a version (``billing@0123456789ab``), which then must be the newest. Raises AdapterError for
        another base, CheckpointError for a bundle that is damaged.
        """
        plain, _, version = name.partition("@")
        if not NAME.fullmatch(plain):
            return None
        place = (self.directory / plain).resolve()
        if not place.is_relative_to(self.directory.resolve()) or not is_packed(place):
            return None
        packed = read_packed(place)  # every byte is checked against the manifest's sums
        found = self._version(packed.sha256)
        if version and version != found[:DIGITS]:
            return None
        if self.fingerprint is not None and packed.base != self.fingerprint:
            raise AdapterError(
                f"the adapter {plain} is for the base {(packed.base or 'of no name')[:DIGITS]}, and this server's is "
                f"{self.fingerprint[:DIGITS]}; move it with `bitloft rebase`."
            )
        full = f"{plain}@{found[:DIGITS]}"
        return Expanded(full, int(found[:15], 16), self.cache / full, self._expand(place, self.cache / full))

    def _version(self, bundle: str) -> str:
        """The bundle's sum; with a start, of both."""
        if self.start is None:
            return bundle
        start = sha256((self.start / WEIGHTS_FILE).read_bytes()).hexdigest()
        return sha256((bundle + start).encode()).hexdigest()

    def _expand(self, place: Path, out: Path) -> int:
        """Write the plain adapter, once; its rank. Two processes that do it at once write the same."""
        factors = read_factors(place)
        pairs = dict(factors.pairs)
        if self.start is not None:
            for name, pair in read_factors(self.start).pairs.items():
                pairs[name] = stacked(pair, pairs[name]) if name in pairs else pair
        if not out.exists():
            leaves = sorted({name.rpartition(".")[2] for name in pairs})
            config = {"task_type": factors.config.get("task_type"), "target_modules": leaves}
            with writing(out, overwrite=True) as directory:
                write_lora(directory, pairs, base_name=str(self.directory), config=config, dtype=torch.float16)
        return max(_rank(pair) for pair in pairs.values())


def _rank(pair: Pair) -> int:
    return max(pair.rank, 1)


def resolver(bundles: Bundles) -> Any:
    """A ``LoRAResolver`` of vLLM over these bundles. Raises ImportError without vLLM."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class BitloftResolver(LoRAResolver):
        """Finds packed adapters for vLLM."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The request that loads an adapter; None (vLLM answers 404) where there is none or it is refused."""
            try:
                found = await asyncio.get_running_loop().run_in_executor(None, bundles.find, lora_name)
            except BitloftError as error:
                log.warning("adapter %s is not served: %s", lora_name, error)
                return None
            if found is None:
                return None
            return LoRARequest(lora_name=found.name, lora_int_id=found.number, lora_path=str(found.path))

    return BitloftResolver()


def register() -> None:
    """What vLLM calls when it loads its plugins."""
    bundles = Bundles.from_environment()
    if bundles is None:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver("bitloft", resolver(bundles))
