"""integrations/vllm.py at the level of files and of the interface: the stub below has what the plugin uses of vLLM.

The interface was read from vLLM's source (vllm/lora/resolver.py, vllm/lora/request.py, plugins/lora_resolvers): a
resolver is registered by name and asked ``resolve_lora(base_model_name, lora_name)``, a coroutine that gives a
``LoRARequest`` or None. vLLM itself was not run.
"""

import asyncio
import logging
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitloft.adapters import read_adapter, read_packed
from bitloft.checkpoint import read_json, read_tensors
from bitloft.compress import compress
from bitloft.convert import convert
from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.factors import read_factors
from bitloft.integrations import vllm as plugin
from bitloft.integrations.vllm import Bundles
from bitloft.quantize import quantize
from tests.helpers import make_adapter


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRAResolver:
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        return None


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The stub in place of vLLM."""
    found = Registry()
    for name, parts in (
        ("vllm", {}), ("vllm.lora", {}), ("vllm.lora.request", {"LoRARequest": LoRARequest}),
        ("vllm.lora.resolver", {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": found}),
    ):  # fmt: skip
        module = ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in uniform codes, and a directory with one packed adapter of it and one of another base."""
    place = tmp_path_factory.mktemp("vllm")
    quantize(tiny_model, place / "base", format="uniform4:32", rank=4)
    compress(make_adapter(place / "plain", base=place / "base"), place / "adapters" / "billing", bits=4.0)
    compress(make_adapter(place / "foreign", seed=2), place / "adapters" / "foreign", bits=4.0)
    return place


def bundles(place: Path, cache: Path, **changes: Any) -> Bundles:
    fingerprint = read_json(place / "base" / "manifest.json")["fingerprint"]
    return Bundles(**{"directory": place / "adapters", "cache": cache, "fingerprint": fingerprint} | changes)


def test_a_bundle_becomes_a_versioned_16_bit_adapter(place: Path, tmp_path: Path) -> None:
    found = bundles(place, tmp_path).find("billing")
    assert found is not None
    packed = read_packed(place / "adapters" / "billing")
    assert found.name == f"billing@{packed.sha256[:12]}"
    assert found.number == int(packed.sha256[:15], 16)
    tensors = read_tensors(found.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    config = read_json(found.path / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", found.rank, found.rank)
    assert config["target_modules"] == sorted({name.rpartition(".")[2] for name in packed.modules})
    exact = read_factors(place / "adapters" / "billing").pairs
    for pair in read_adapter(found.path).pairs:
        product = pair.scaling * pair.b.float() @ pair.a.float()
        wanted = exact[pair.name].product()
        assert torch.linalg.norm(product - wanted) < 1e-3 * torch.linalg.norm(wanted)
    again = bundles(place, tmp_path).find(found.name)  # by its version, from the cache
    assert again == found


def test_another_version_is_another_name_and_number(place: Path, tmp_path: Path) -> None:
    compress(make_adapter(tmp_path / "new", seed=5, base=place / "base"), tmp_path / "adapters" / "billing", bits=4.0)
    old = bundles(place, tmp_path / "c").find("billing")
    new = bundles(place, tmp_path / "c", directory=tmp_path / "adapters").find("billing")
    assert old is not None
    assert new is not None
    assert (old.name, old.number, old.path) != (new.name, new.number, new.path)
    assert bundles(place, tmp_path / "c", directory=tmp_path / "adapters").find(old.name) is None


def test_the_start_is_joined_where_the_export_has_none(place: Path, tmp_path: Path) -> None:
    convert(place / "base", tmp_path / "gptq", to="gptq")
    found = bundles(place, tmp_path / "c", start=tmp_path / "gptq" / "start").find("billing")
    plain = bundles(place, tmp_path / "c").find("billing")
    assert found is not None
    assert plain is not None
    assert found.rank == plain.rank + 4
    assert found.number != plain.number
    start = read_factors(tmp_path / "gptq" / "start").pairs
    adapter = read_factors(place / "adapters" / "billing").pairs
    for pair in read_adapter(found.path).pairs:
        wanted = start[pair.name].product() + adapter[pair.name].product()
        assert torch.linalg.norm(pair.b.float() @ pair.a.float() - wanted) < 2e-3 * torch.linalg.norm(wanted)


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"is for the base of no name, and this server's is .*bitloft rebase"):
        bundles(place, tmp_path).find("foreign")
    assert bundles(place, tmp_path, fingerprint=None).find("foreign") is not None
    for name in ("nothing", "../adapters/billing", "/etc", "a/b", "", "billing@000000000000", "x" * 200, "\0"):
        assert bundles(place, tmp_path).find(name) is None
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "out").symlink_to(place / "adapters" / "billing")
    assert bundles(place, tmp_path, directory=tmp_path / "adapters").find("out") is None
    compress(make_adapter(tmp_path / "p", base=place / "base"), tmp_path / "adapters" / "bad", bits=4.0)
    file = tmp_path / "adapters" / "bad" / "adapter_model.bitloft.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        bundles(place, tmp_path, directory=tmp_path / "adapters").find("bad")


def test_the_plugin_registers_and_resolves(
    registry: Registry, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    assert registry.resolvers == {}  # nothing is asked for
    monkeypatch.setenv("BITLOFT_VLLM_ADAPTERS", str(place / "adapters"))
    monkeypatch.setenv("BITLOFT_VLLM_BASE", str(place / "base"))
    monkeypatch.setenv("BITLOFT_VLLM_CACHE", str(tmp_path / "cache"))
    plugin.register()
    resolver = registry.resolvers["bitloft"]
    request = asyncio.run(resolver.resolve_lora("served", "billing"))
    assert request is not None
    assert request.lora_name.startswith("billing@")
    assert Path(request.lora_path) == tmp_path / "cache" / request.lora_name
    assert asyncio.run(resolver.resolve_lora("served", "nothing")) is None
    with caplog.at_level(logging.WARNING, logger="bitloft"):
        assert asyncio.run(resolver.resolve_lora("served", "foreign")) is None
    assert "foreign is not served" in caplog.text


def test_settings_from_the_environment(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLOFT_VLLM_ADAPTERS", str(tmp_path / "none"))
    with pytest.raises(OptionError, match="which is no directory"):
        Bundles.from_environment()
    monkeypatch.setenv("BITLOFT_VLLM_ADAPTERS", str(place / "adapters"))
    with pytest.raises(OptionError, match="BITLOFT_VLLM_BASE is not set"):
        Bundles.from_environment()
    for given, fingerprint in (("any", None), ("a" * 64, "a" * 64)):
        monkeypatch.setenv("BITLOFT_VLLM_BASE", given)
        found = Bundles.from_environment()
        assert found is not None
        assert found.fingerprint == fingerprint


def test_the_entry_point_is_this_module() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"bitloft": "bitloft.integrations.vllm:register"}
