"""An adapter's files on their way into a server: links that appear meanwhile (R17), pickles beside them (R18)."""

import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from bitloft.adapters import WEIGHTS_FILE
from bitloft.errors import AdapterError, BitloftError, CheckpointError
from bitloft.folder import Folder, pinned
from bitloft.integrations.loading import load
from bitloft.modules.multi import AdapterBank
from bitloft.options import ServeOptions
from bitloft.serve import store
from bitloft.serve.files import identity, inside
from bitloft.serve.store import AdapterStore
from tests.serving import PACKED, PLAIN, World

MINE, OTHERS = PACKED[0], PACKED[1]


@pytest.fixture(scope="module")
def model(world: World) -> Any:
    """A model of its own: two banks would take the served model's hooks from each other."""
    return load(world.base)


@contextmanager
def stored(world: World, model: Any, **settings: Any) -> Iterator[AdapterStore]:
    found = AdapterStore(AdapterBank(model), world.service.store.record, "base", ServeOptions(**settings))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def place(world: World, tmp_path: Path) -> Path:
    """An adapter directory with one adapter; another adapter lies outside of it."""
    copytree(world.adapters / OTHERS, tmp_path / "outside")
    return copytree(world.adapters / MINE, tmp_path / "adapters" / "mine")


def swap(directory: Path) -> None:
    """Put a link to the adapter outside where ``directory`` was."""
    directory.rename(directory.with_name(".moved"))
    directory.symlink_to(directory.parent.parent / "outside", target_is_directory=True)


# ---- identity --------------------------------------------------------------------------------------------------------


def test_identity(world: World, place: Path) -> None:
    with pinned(place) as packed, pinned(world.adapters / PLAIN) as plain:
        assert identity(packed, None) == identity(packed, 2.0)  # packed already
        assert identity(packed, None)[0] == world.service.store.find(MINE).key
        (key, size), (other, less) = identity(plain, None), identity(plain, 4.0)
    assert key == world.service.store.find(PLAIN).key != other
    assert size == (world.adapters / PLAIN / WEIGHTS_FILE).stat().st_size
    assert less == round(size / 8)


def test_what_has_no_identity(place: Path) -> None:
    with pinned(place) as folder:
        (place / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match=r"lacks manifest\.json; it is not a whole packed adapter"):
            identity(folder, None)
    with pinned(place.parent) as folder, pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        identity(folder, None)


def test_inside(place: Path) -> None:
    assert inside(place, place.parent) == place
    (place.parent / "alias").symlink_to("mine")
    assert inside(place.parent / "alias", place.parent) == place
    (place.parent / "out").symlink_to("../outside")
    with pytest.raises(AdapterError, match="'out' leads out of the adapter directory"):
        inside(place.parent / "out", place.parent)


# ---- R17: between a check and what follows it ------------------------------------------------------------------------


def test_an_alias_inside_the_directory_is_served(world: World, model: Any, place: Path) -> None:
    (place.parent / "alias").symlink_to("mine")
    with stored(world, model) as found:
        found.scan(place.parent)
        assert found.names == ("alias", "mine")
        assert found.find("alias").key == found.find("mine").key


def test_a_directory_that_becomes_a_link_after_it_was_checked(
    world: World, model: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(path: Path, directory: Path) -> Path:
        found = inside(path, directory)
        swap(path)
        return found

    monkeypatch.setattr(store, "inside", checked)
    with stored(world, model) as found:
        found.scan(place.parent)
        assert found.names == ()
        assert "mine is no directory, or a part of the path is a link" in found.refused["mine"]
        assert found.bank.names == ()


def test_a_directory_that_becomes_a_link_after_it_was_opened(
    world: World, model: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened is what is summed; the load that follows opens anew, and refuses the link."""
    keys = []

    def summed(folder: Folder, pack_plain: float | None) -> tuple[str, int]:
        swap(folder.path)
        found = identity(folder, pack_plain)
        keys.append(found[0])
        return found

    monkeypatch.setattr(store, "identity", summed)
    with stored(world, model) as found:
        found.scan(place.parent)
        assert keys == [world.service.store.find(MINE).key]
        assert found.names == ()
        assert "is no directory, or a part of the path is a link" in found.refused["mine"]


def test_a_version_whose_directory_became_a_link_is_not_read_again(world: World, model: Any, place: Path) -> None:
    """An adapter that is out of memory comes back from where it was, or not at all."""
    size = sum(file.stat().st_size for file in place.glob("adapter_model*"))
    copytree(world.adapters / PACKED[2], place.with_name("third"))
    with stored(world, model, adapter_budget=str(size + 6000)) as found:
        found.scan(place.parent)
        with found.holding("third"):
            assert not found.find("mine").resident
        swap(place)
        handle = found.acquire("mine")
        with pytest.raises(BitloftError, match="is no directory, or a part of the path is a link"):
            found.residency.wait(handle.version)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bitloft.safetensors", "manifest.json"])
def test_files_that_are_links_are_refused(world: World, model: Any, place: Path, name: str) -> None:
    (place / name).unlink()
    (place / name).symlink_to(place.parent.parent / "outside" / name)
    with stored(world, model) as found:
        found.scan(place.parent)
        assert f"mine/{name}: it is a link; put the file itself there" in found.refused["mine"]


def test_a_directory_that_is_swapped_all_the_time(world: World, model: Any, place: Path) -> None:
    """Whatever the moment: the adapter outside is never the one that is served."""
    link, stop, swaps = place.with_name(".link"), threading.Event(), [0]
    link.symlink_to(place.parent.parent / "outside", target_is_directory=True)

    def change() -> None:
        while not stop.is_set():
            place.rename(place.with_name(".moved"))
            link.rename(place)
            place.rename(link)
            place.with_name(".moved").rename(place)
            swaps[0] += 1

    outside = world.service.store.find(OTHERS).key
    tried, served = 0, 0
    with stored(world, model) as found:
        thread = threading.Thread(target=change)
        thread.start()
        try:
            while served < 3 or tried < 100 or swaps[0] < 100:
                tried += 1
                found.scan(place.parent)
                if "mine" in found.names:
                    served += 1
                    assert found.find("mine").key != outside
                    found.remove("mine")
                assert outside not in found.bank.names
        finally:
            stop.set()
            thread.join()


# ---- R18: pickles ----------------------------------------------------------------------------------------------------


class Marker:
    """Unpickling one appends to ``CALLS``: code of the file's choosing would run here."""

    def __reduce__(self) -> Any:
        return called, ()


CALLS: list[str] = []
PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pkl", "adapter_model.npz", "adapter_model.gguf",
           "adapter_model.pth", "adapter_model.ckpt", "training_args.bin")  # fmt: skip


def called() -> None:
    CALLS.append("ran")


class Watch:
    """What the interpreter tells of unpickling and of opened files. A hook cannot be taken out again, only silenced."""

    def __init__(self) -> None:
        self.active, self.events = False, list[tuple[str, str]]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.active and event in ("pickle.find_class", "open"):
            self.events.append((event, str(args[0])))

    @contextmanager
    def __call__(self) -> Iterator[list[tuple[str, str]]]:
        self.events.clear()
        self.active = True
        try:
            yield self.events
        finally:
            self.active = False


@pytest.fixture(scope="module")
def watch() -> Callable[[], AbstractContextManager[list[tuple[str, str]]]]:
    return Watch()


@pytest.fixture
def no_torch_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)


def test_the_watch_hears_a_pickle(watch: Any, tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Marker()))
    CALLS.clear()
    with watch() as heard:
        pickle.loads((tmp_path / "adapter_model.bin").read_bytes())
    assert CALLS == ["ran"]
    assert {event for event, _ in heard} == {"pickle.find_class", "open"}


@pytest.mark.parametrize("kind", [MINE, PLAIN])
@pytest.mark.parametrize("packed_on_load", [None, 4.0])
@pytest.mark.usefixtures("no_torch_load")
def test_pickles_beside_the_weights_are_never_opened(
    world: World, model: Any, watch: Any, tmp_path: Path, kind: str, packed_on_load: float | None
) -> None:
    place = copytree(world.adapters / kind, tmp_path / "adapters" / "mine")
    for name in PICKLED:
        (place / name).write_bytes(pickle.dumps(Marker()))
    CALLS.clear()
    with stored(world, model, pack_plain=packed_on_load) as found, watch() as heard:
        found.scan(place.parent)
        with found.holding("mine"):
            assert found.find("mine").resident
    assert CALLS == []
    assert not [event for event in heard if event[0] == "pickle.find_class"]
    opened = {Path(path).name for event, path in heard if event == "open"}
    assert not opened & set(PICKLED)
    assert opened >= {"adapter_config.json"}


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.usefixtures("no_torch_load")
def test_pickles_instead_of_weights_are_refused(
    world: World, model: Any, watch: Any, tmp_path: Path, name: str
) -> None:
    """Nothing falls back to them, whether they bear their own name or that of the weights."""
    place = copytree(world.adapters / PLAIN, tmp_path / "adapters" / "own")
    (place / WEIGHTS_FILE).unlink()
    (place / name).write_bytes(pickle.dumps(Marker()))
    for weights, kind in ((WEIGHTS_FILE, PLAIN), ("adapter_model.bitloft.safetensors", MINE)):
        other = copytree(world.adapters / kind, tmp_path / "adapters" / f"renamed-{kind}")
        (other / weights).write_bytes(pickle.dumps(Marker()))
    CALLS.clear()
    with stored(world, model) as found, watch() as heard:
        found.scan(place.parent)
        assert found.names == ()
    assert found.refused.keys() == {"own", f"renamed-{PLAIN}", f"renamed-{MINE}"}
    wanted = "only as a pickle" if Path(name).suffix in (".bin", ".pt", ".pkl", ".pth", ".ckpt") else "holds no adapter"
    assert ("holds no adapter" if name == "training_args.bin" else wanted) in found.refused["own"]
    assert CALLS == []
    assert not [event for event in heard if event[0] == "pickle.find_class"]
    assert name not in {Path(path).name for event, path in heard if event == "open"}
