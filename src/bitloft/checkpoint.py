"""Files: safetensors read into private memory, directories written beside and renamed, manifests with sha256 sums.

Nothing here maps a file: a mapped tensor changes when the file is overwritten and a truncation kills the process with
SIGBUS. Nothing here opens a pickle.
"""

import hashlib
import io
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from bitloft.errors import CheckpointError

MANIFEST = "manifest.json"
SCHEMA = 1
HEADER_LIMIT = 32 << 20  # bytes of a safetensors header: ours take a few hundred per tensor
JSON_LIMIT = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@contextmanager
def writing(out: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside ``out`` to write into; on success it is fsynced and renamed to ``out``, else removed.

    Raises CheckpointError where ``out`` exists (and overwrite is off), or where the disk is full.
    """
    out = Path(out).absolute()
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out)
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}; nothing was left there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(directory: Path, out: Path) -> None:
    """Fsync a finished ``directory`` and rename it to ``out``, replacing what is there (same file system; OSError)."""
    _settle(directory)
    if out.exists():
        retired = out.parent / f".{out.name}.tmp-{os.getpid()}-old"
        out.rename(retired)
        directory.rename(out)
        shutil.rmtree(retired)
    else:
        directory.rename(out)
    _fsync(out.parent)


def sweep(out: Path) -> None:
    """Remove what an interrupted run of a process that is gone left beside ``out``."""
    for leftover in out.parent.glob(f".{out.name}.tmp-*"):
        pid = leftover.name.split(".tmp-", 1)[1].split("-", 1)[0]
        if not pid.isdigit() or not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _settle(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        _fsync(path)
    directory.chmod(0o755)
    _fsync(directory)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(file: Path | str) -> Any:
    """Parse a JSON file. Raises CheckpointError where it is missing, too large or not JSON."""
    file = Path(file)
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; a JSON file here stays under {JSON_LIMIT}.")
        return parse_json(file.read_bytes(), file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}.") from error


def parse_json(raw: bytes, file: Path) -> Any:
    """The value of a file's bytes. Raises CheckpointError, naming the ``file``, where they are not JSON."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); it may be damaged.") from error


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_header(file: Path | str) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets (and ``__metadata__``)."""
    file = Path(file)
    try:
        with file.open("rb") as stream:
            return _header(stream, file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}.") from error


def _header(stream: io.BufferedIOBase, file: Path) -> dict[str, Any]:
    try:
        size = struct.unpack("<Q", stream.read(8))[0]
        if size > HEADER_LIMIT:
            raise CheckpointError(f"{file} claims a header of {size} bytes; it is damaged or not safetensors.")
        header = json.loads(stream.read(size))
    except (struct.error, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has no readable safetensors header; it is truncated or damaged.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has no readable safetensors header; it is truncated or damaged.")
    return header


def read_tensors(file: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own."""
    file = Path(file)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}.") from error
    return parse_tensors(raw, file)


def parse_tensors(raw: bytes, file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file's bytes, in memory of their own; ``file`` is for what is said of it."""
    _header(io.BytesIO(raw), file)
    try:
        return safetensors.torch.load(raw)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a valid safetensors file ({error}); it may be truncated.") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors; the bytes depend on names, order and values only."""
    try:
        file.write_bytes(safetensors.torch.save(dict(tensors), None if metadata is None else dict(metadata)))
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {file}: {error}.") from error


def replace_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as ``file``, whole or not at all: written beside, fsynced, renamed."""
    beside = file.with_name(f".{file.name}.tmp")
    write_tensors(beside, tensors, metadata)
    _fsync(beside)
    beside.replace(file)


def replace_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all: written beside, fsynced, renamed."""
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    _fsync(beside)
    beside.replace(file)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model or adapter folder, sorted.

    Raises CheckpointError where there are none, with the reason: a folder that does not exist, that holds pickles only
    or no weights at all.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a model folder.")
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = [p.name for p in sorted(directory.iterdir()) if p.suffix in PICKLES and p.name != "training_args.bin"]
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights only as a pickle ({pickles[0]}), which can run code when opened; "
            "convert it to safetensors first."
        )
    raise CheckpointError(f"{directory} holds no weights: no *.safetensors file was found.")


def ignored_pickles(directory: Path) -> list[str]:
    """Pickles beside the weights, such as Trainer's training_args.bin: never opened, listed in reports."""
    return [p.name for p in sorted(directory.iterdir()) if p.suffix in PICKLES]


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a model folder holds beside config and weights (tokenizer, template, generation config, vocabulary).

    Files that ``target`` has already, pickles, and what bitloft says of ``source`` alone stay behind.
    """
    own = (MANIFEST, "config.json", "README.md")
    for file in sorted(source.iterdir()):
        wanted = file.is_file() and not file.name.startswith((".", "bitloft_")) and file.name not in own
        weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if wanted and not weights and file.suffix not in PICKLES and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def fingerprint(files: Iterable[Path]) -> str:
    """One digest over the names and contents of weight files, in name order."""
    lines = [f"{file.name} {sha256(file)}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(directory: Path, kind: str, extra: Mapping[str, Any]) -> None:
    """List every file of ``directory`` with size and sha256, plus what ``extra`` says, in manifest.json."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(directory / MANIFEST, {"schema": SCHEMA, "kind": kind, "files": files, **extra})


def read_manifest(directory: Path | str, kind: str, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a bundle, after checking its files. Raises CheckpointError naming the first file that differs."""
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind or not isinstance(manifest.get("files"), dict):
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{directory / MANIFEST} does not describe a bundle of kind {kind!r} (found {found!r}).")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{directory} has schema {manifest.get('schema')!r}; this version reads {SCHEMA}.")
    for name, record in manifest["files"].items() if verify else ():
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()) or not file.is_file():
            raise CheckpointError(f"{directory} lacks {name}, which its manifest lists.")
        if file.stat().st_size != record["bytes"] or sha256(file) != record["sha256"]:
            raise CheckpointError(f"{file} differs from its manifest: it is damaged or was changed.")
    return manifest
