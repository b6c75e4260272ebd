"""Files of a directory, and of one that is pinned: what is read is what lay there, and no link leads elsewhere."""

import os
import socket
from pathlib import Path

import pytest

from bitloft.errors import CheckpointError
from bitloft.folder import Folder, pinned


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a file, and one beside it that is nobody's business."""
    for name, text in (("here", "mine"), ("elsewhere", "secret")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text, encoding="utf-8")
    return tmp_path / "here"


def swap(place: Path) -> None:
    """Put a link to the other directory where ``place`` was."""
    place.rename(place.with_name("moved"))
    place.symlink_to(place.with_name("elsewhere"), target_is_directory=True)


def test_files_by_path_and_pinned_are_the_same(place: Path) -> None:
    (place / "below").mkdir()
    with pinned(place) as held:
        for folder in (Folder(place), Folder.of(str(place)), held, Folder.of(held)):
            assert (folder.read("file"), folder.size("file"), folder.has("file")) == (b"mine", 4, True)
            assert (folder.read("none"), folder.size("none"), folder.has("below")) == (None, None, False)
            assert folder.read("below") is None
            assert (folder.names(), folder.is_directory(), str(folder)) == (["below", "file"], True, str(place))
    assert Folder.of(held) is held
    assert not Folder(place / "file").is_directory()


def test_a_limit(place: Path) -> None:
    with pinned(place) as held:
        for folder in (Folder(place), held):
            with pytest.raises(CheckpointError, match="file has 4 bytes; such a file stays under 3"):
                folder.read("file", 3)
            assert folder.read("file", 4) == b"mine"


def test_what_is_pinned_stays_what_it_was(place: Path) -> None:
    """R17: the directory becomes a link to another after it was opened, and a file another file."""
    with pinned(place) as held:
        swap(place)
        assert held.read("file") == b"mine"
        (place.with_name("moved") / "file").write_text("later", encoding="utf-8")
        assert held.read("file") == b"mine"  # once read, the same for all who ask
        assert held.size("file") == 5
    assert Folder(place).read("file") == b"secret"


def test_a_link_is_not_followed(place: Path) -> None:
    (place / "link").symlink_to(place.with_name("elsewhere") / "file")
    (place / "loop").symlink_to("loop")
    with pinned(place) as held:
        for name in ("link", "loop"):
            for ask in (held.read, held.size, held.has):
                with pytest.raises(
                    CheckpointError, match=f"cannot read .*{name}: it is a link; put the file itself there"
                ):
                    ask(name)
    assert Folder(place).read("link") == b"secret"
    swap(place)
    (place.with_name("elsewhere") / "deep").mkdir()
    for path in (place, place / "deep"):  # the last name of a path, and one on the way
        with pytest.raises(CheckpointError, match="is no directory, or a part of the path is a link"), pinned(path):
            pass


def test_paths_that_lead_nowhere(place: Path) -> None:
    with pytest.raises(CheckpointError, match="gone/x does not exist"), pinned(place / "gone" / "x"):
        pass
    with pytest.raises(CheckpointError, match="file is no directory"), pinned(place / "file"):
        pass


def test_relative_paths(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)
    with pinned("elsewhere/../here") as held:
        assert (held.read("file"), held.path) == (b"mine", place)


def test_things_that_are_no_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe nobody writes to must not hold up who looks, nor a socket."""
    os.mkfifo(place / "pipe")
    monkeypatch.chdir(place)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener, pinned(place) as held:
        listener.bind("socket")
        assert held.read("pipe") is None
        assert Folder(place).read("socket") is None
        with pytest.raises(CheckpointError, match="cannot read"):
            held.read("socket")


def test_no_descriptor_is_left(place: Path) -> None:
    (place / "link").symlink_to("file")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        with pinned(place) as held:
            assert (held.has("none"), held.has("file"), held.read("file")) == (False, True, b"mine")
            with pytest.raises(CheckpointError):
                held.read("link")
        with pytest.raises(CheckpointError), pinned(place / "gone"):
            pass
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)
