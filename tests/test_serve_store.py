"""The adapters of a directory: what is served under which name, what is refused and why."""

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest

from bitloft.compress import compress
from bitloft.errors import CheckpointError
from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record
from bitloft.modules.multi import AdapterBank
from bitloft.quantize import quantize
from bitloft.serve.requests import RequestError
from bitloft.serve.residency import MARGIN
from bitloft.serve.store import NAME, AdapterStore
from tests.helpers import make_adapter, tiny_llama
from tests.serving import PACKED, PLAIN, World

REASONS = {
    "empty": "holds no adapter_config.json; it is not a PEFT adapter",
    "foreign": "was trained for another base (fingerprint ffffffffffff)",
    "not a name": "'not a name' cannot be a model name",
    "outside": "'outside' leads out of the adapter directory",
    "poison": "holds NaN or infinity",
}


@pytest.fixture
def store(world: World) -> Iterator[AdapterStore]:
    """An empty store over a model of its own: two banks would take the served model's hooks from each other."""
    found = AdapterStore(AdapterBank(load(world.base)), world.service.store.record, "base")
    yield found
    found.close()


def test_what_is_served_and_what_is_refused(world: World) -> None:
    found = world.service.store
    assert found.names == tuple(sorted((*PACKED, PLAIN)))
    assert found.refused.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert reason in found.refused[name]
        assert any(line.startswith(f"adapter {name} is not served:") and reason in line for line in world.said)
    assert all(any(line.startswith(f"adapter {name}: ") for line in world.said) for name in found.names)


def test_packed_adapters_stay_packed(world: World) -> None:
    found = world.service.store
    plain, packed = found.find(PLAIN), found.find(PACKED[0])
    assert packed.nbytes - MARGIN < 0.2 * plain.nbytes  # 4 bits against 32
    assert found.bank.nbytes(str(packed.key)) == packed.nbytes - MARGIN


def test_the_base_has_two_spellings(world: World) -> None:
    assert world.service.store.find(None) == world.service.store.find("base")
    assert world.service.store.find("base").key is None


@pytest.mark.parametrize("name", ["nobody", "", "../alpha", "alpha/", "ALPHA", "alpha\0", "x" * 5000, "note.txt"])
def test_unknown_names(world: World, name: str) -> None:
    with pytest.raises(RequestError, match="does not exist") as caught:
        world.service.store.find(name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert len(str(caught.value)) < 400


def test_a_refused_name_points_to_the_log_and_not_to_paths(world: World) -> None:
    with pytest.raises(RequestError, match="the adapter 'foreign' was refused; the server's log says why") as caught:
        world.service.store.find("foreign")
    assert str(world.adapters) not in str(caught.value)


def test_equal_files_share_one_version(world: World, store: AdapterStore, tmp_path: Path) -> None:
    for name in ("one", "two"):
        copytree(world.adapters / PACKED[0], tmp_path / name)
    copytree(world.adapters / PACKED[1], tmp_path / "three")
    for name in ("four", "five"):
        copytree(world.adapters / PLAIN, tmp_path / name)
    store.scan(tmp_path)
    keys = {name: store.find(name).key for name in store.names}
    assert keys["one"] == keys["two"] == world.service.store.find(PACKED[0]).key
    assert keys["four"] == keys["five"]
    assert len(set(keys.values())) == len(store.bank.names) == 3


def test_an_adapter_cannot_take_the_base_name(world: World, store: AdapterStore, tmp_path: Path) -> None:
    copytree(world.adapters / PACKED[0], tmp_path / "base")
    store.scan(tmp_path)
    assert "is the name of the base" in store.refused["base"]
    assert store.find("base").key is None


def test_an_adapter_of_another_shape(world: World, store: AdapterStore, tmp_path: Path) -> None:
    copytree(world.adapters / PLAIN, tmp_path / "wide")
    config = tmp_path / "wide" / "adapter_config.json"
    from safetensors.torch import load, save_file

    weights = tmp_path / "wide" / "adapter_model.safetensors"
    tensors = {k.replace("layers.1", "layers.7"): v for k, v in load(weights.read_bytes()).items()}
    save_file(tensors, weights)
    store.scan(tmp_path)
    assert "which the model does not have; it belongs to another base" in store.refused["wide"]
    assert config.exists()
    assert store.bank.names == ()


def test_an_adapter_of_another_base_of_the_same_name_and_shapes(world: World, tmp_path: Path) -> None:
    """R16: fingerprints decide, not names: two bases whose directories and shapes are alike, each with an adapter."""
    bases = {}
    for seed in (11, 12):
        place = tmp_path / str(seed)
        quantize(tiny_llama(place / "model", seed=seed), place / "base", format="lm4:64", rank=4)
        bases[seed] = place / "base"
        plain = make_adapter(place / "plain", seed=seed, base=bases[seed])
        copytree(plain, tmp_path / "served" / f"plain-{seed}")
        compress(plain, tmp_path / "served" / f"packed-{seed}", bits=4.0)
    for seed, other in ((11, 12), (12, 11)):
        store = AdapterStore(AdapterBank(load(bases[seed])), base_record(bases[seed]), "base")
        store.scan(tmp_path / "served")
        assert store.names == (f"packed-{seed}", f"plain-{seed}")
        assert store.refused.keys() == {f"packed-{other}", f"plain-{other}"}
        assert all("trained for another base (fingerprint" in reason for reason in store.refused.values())
        store.close()


def test_hidden_directories_are_left_alone(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    store.scan(tmp_path)
    assert not store.names
    assert not store.refused


def test_a_missing_directory(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the adapter directory .*nowhere does not exist"):
        store.scan(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["..", ".x", "-x", "a/b", "a\\b", "a b", "ä", "a\n", "x" * 129, "", "%2e%2e"])
def test_names_that_are_no_names(name: str) -> None:
    assert not NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["a", "A1", "my-adapter_v1.2", "x" * 128])
def test_names(name: str) -> None:
    assert NAME.fullmatch(name)
