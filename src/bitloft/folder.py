"""A directory of files that are read whole: by its path, or pinned, so that nothing can be put in its place meanwhile.

Looking at a path and opening it are two moments. Between them whoever may write there can put a link to elsewhere.
``pinned`` opens a path name by name, none of which may be a link, and every file relative to the directory that was
opened: what is read is what lies there, whatever becomes of the path.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from bitloft.errors import CheckpointError

_THROUGH = getattr(os, "O_PATH", os.O_RDONLY)  # of directories on the way, which need not be readable


class Folder:
    """The files of a directory, by name. Links are followed; ``pinned`` makes one that does not."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @staticmethod
    def of(place: "Folder | Path | str") -> "Folder":
        """``place`` itself where it is one already."""
        return place if isinstance(place, Folder) else Folder(place)

    def is_directory(self) -> bool:
        return self.path.is_dir()

    def names(self) -> list[str]:
        """All names in it, sorted."""
        return sorted(os.listdir(self.path))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where ``name`` is none. Raises CheckpointError where it may not be read."""
        with self._opened(name) as stream:
            return None if stream is None else os.fstat(stream.fileno()).st_size

    def has(self, name: str) -> bool:
        """Whether ``name`` is a file."""
        return self.size(name) is not None

    def read(self, name: str, limit: int | None = None) -> bytes | None:
        """A file's bytes; None where ``name`` is none, whatever else it may be.

        Raises CheckpointError where it cannot be read or has more than ``limit`` bytes.
        """
        with self._opened(name) as stream:
            if stream is None:
                return None
            size = os.fstat(stream.fileno()).st_size
            if limit is not None and size > limit:
                raise CheckpointError(f"{self.path / name} has {size} bytes; such a file stays under {limit}.")
            return stream.read()

    @contextmanager
    def _opened(self, name: str) -> Iterator[BufferedReader | None]:
        file = self.path / name
        try:
            if not file.is_file():
                yield None
                return
            with file.open("rb") as stream:
                yield stream
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}.") from error


class _Pinned(Folder):
    def __init__(self, path: Path, descriptor: int) -> None:
        super().__init__(path)
        self._at = descriptor
        self._kept: dict[str, bytes | None] = {}

    def forget(self) -> None:
        self._kept.clear()

    def is_directory(self) -> bool:
        return True

    def names(self) -> list[str]:
        return sorted(os.listdir(self._at))

    def read(self, name: str, limit: int | None = None) -> bytes | None:
        """Each file is read once: who asks again gets the same bytes, whatever has become of the file."""
        if name not in self._kept:
            self._kept[name] = super().read(name, limit)
        return self._kept[name]

    @contextmanager
    def _opened(self, name: str) -> Iterator[BufferedReader | None]:
        descriptor = self._descriptor(name)
        if descriptor is None:
            yield None
            return
        with open(descriptor, "rb") as stream:
            yield stream

    def _descriptor(self, name: str) -> int | None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe without a writer would block
        try:
            found = os.open(name, flags, dir_fd=self._at)
        except FileNotFoundError:
            return None
        except OSError as error:
            why = "it is a link; put the file itself there" if error.errno == errno.ELOOP else error.strerror
            raise CheckpointError(f"cannot read {self.path / name}: {why}.") from error
        if stat.S_ISREG(os.fstat(found).st_mode):
            return found
        os.close(found)
        return None


@contextmanager
def pinned(path: Path | str) -> Iterator[Folder]:
    """The directory at ``path`` as it is now, for the length of the block, each file as it was first read; links are
    refused.

    Raises CheckpointError where a name of the path leads nowhere, is no directory, or is a link.
    """
    path = Path(os.path.abspath(path))
    at = os.open(path.anchor, _THROUGH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for i, part in enumerate(path.parts[1:], 2):
            mode = os.O_RDONLY if i == len(path.parts) else _THROUGH
            try:
                below = os.open(part, mode | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            except OSError as error:
                why = "is no directory, or a part of the path is a link" if path.exists() else "does not exist"
                raise CheckpointError(f"{path} {why}; put the directory itself there.") from error
            os.close(at)
            at = below
        folder = _Pinned(path, at)
        try:
            yield folder
        finally:
            folder.forget()
    finally:
        os.close(at)
