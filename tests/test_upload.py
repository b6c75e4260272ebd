"""integrations/upload.py: a base in object storage is whole or not there, and an upload that broke off goes on.

fsspec's storage in memory for what can go wrong, a server that speaks S3's protocol for the rest: there the model is
read, and the base written, by processes that know nothing but URLs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from bitloft.checkpoint import MANIFEST, read_manifest
from bitloft.errors import CheckpointError
from bitloft.integrations.upload import check_place, staged
from bitloft.quantize import TIMES, quantize
from tests.test_fanout import contents

SETTINGS: dict[str, Any] = {"format": "lm2:64", "rank": 4}


@pytest.fixture
def memory() -> Iterator[Any]:
    storage = fsspec.filesystem("memory")
    yield storage
    storage.rm("/", recursive=True)


def fetched(storage: Any, path: str, directory: Path) -> Path:
    directory.mkdir()
    for name in storage.find(path):
        (directory / name.rpartition("/")[2]).write_bytes(storage.cat_file(name))
    return directory


def test_the_bytes_are_those_of_a_directory(tiny_model: Path, tmp_path: Path, memory: Any) -> None:
    quantize(tiny_model, tmp_path / "here" / "base", **SETTINGS)
    report = quantize(tiny_model, "memory://bucket/bases/base", stage=tmp_path / "stage", **SETTINGS)
    assert report.out == "memory://bucket/bases/base"
    found = fetched(memory, "/bucket/bases/base", tmp_path / "base")
    assert contents(found) == contents(tmp_path / "here" / "base")
    read_manifest(found, "base")
    assert list((tmp_path / "stage").iterdir()) == []


def test_an_upload_that_broke_off_goes_on(
    tiny_model: Path, tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After n files the line is dead: no manifest is there, and the next run sends only what is missing."""
    url, sent, put = "memory://bucket/base", list[str](), type(memory).put_file
    alive = [3]

    def failing(self: Any, local: str, path: str, **kwargs: Any) -> None:
        if not alive[0]:
            raise ConnectionResetError("the line is dead")
        alive[0] -= 1
        sent.append(path.rpartition("/")[2])
        put(self, local, path, **kwargs)

    monkeypatch.setattr(type(memory), "put_file", failing)
    with pytest.raises(CheckpointError, match=r"cannot write .*: the line is dead; .*What is finished stays in .*work"):
        quantize(tiny_model, url, stage=tmp_path, **SETTINGS)
    assert len(memory.find("/bucket/base")) == 3
    with pytest.raises(CheckpointError, match="holds an interrupted run; resume it"):
        quantize(tiny_model, url, stage=tmp_path, **SETTINGS)
    with pytest.raises(CheckpointError, match=r"holds files and no manifest\.json, as a broken upload leaves it"):
        quantize(tiny_model, url, stage=tmp_path / "elsewhere", **SETTINGS)
    alive[0], before = 1000, list(sent)
    memory.pipe_file("/bucket/base/letters.txt", b"somebody's")
    with pytest.raises(CheckpointError, match=r"holds letters\.txt, which is not of this base"):
        quantize(tiny_model, url, stage=tmp_path, resume=True, **SETTINGS)
    assert sent == before
    assert memory.cat_file("/bucket/base/letters.txt") == b"somebody's"
    memory.rm_file("/bucket/base/letters.txt")
    report = quantize(tiny_model, url, stage=tmp_path, resume=True, **SETTINGS)
    assert report.resumed == 14
    assert not set(before) & set(sent[3:]) - {TIMES}  # which tells when
    assert sent[-1] == MANIFEST
    quantize(tiny_model, tmp_path / "here" / "base", **SETTINGS)
    assert contents(fetched(memory, "/bucket/base", tmp_path / "base")) == contents(tmp_path / "here" / "base")


def test_a_base_that_is_there_stays_until_another_is_whole(
    tiny_model: Path, tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://bucket/base"
    quantize(tiny_model, url, stage=tmp_path, **SETTINGS)
    memory.pipe_file("/bucket/base/of_an_earlier_version.json", b"{}")
    with pytest.raises(CheckpointError, match=r"memory://bucket/base exists already; remove it"):
        quantize(tiny_model, url, stage=tmp_path, **SETTINGS)
    quantize(tiny_model, url, stage=tmp_path, overwrite=True, **SETTINGS | {"format": "nf4:64"})
    found = fetched(memory, "/bucket/base", tmp_path / "base")
    read_manifest(found, "base")
    assert not (found / "of_an_earlier_version.json").exists()
    info = type(memory).find

    def short(self: Any, path: str, **kwargs: Any) -> Any:
        records = info(self, path, **kwargs)
        return {name: record | {"size": record["size"] - 1} for name, record in records.items()}

    monkeypatch.setattr(type(memory), "find", short)
    with pytest.raises(CheckpointError, match=r"bytes, and .* were sent; resume"):
        quantize(tiny_model, url, stage=tmp_path, overwrite=True, **SETTINGS)
    monkeypatch.undo()
    assert MANIFEST not in {name.rpartition("/")[2] for name in memory.find("/bucket/base")}


def test_what_cannot_be_written_is_told_first(tiny_model: Path, tmp_path: Path) -> None:
    for url, sentence in (
        ("nosuch://bucket/base", "Protocol not known: nosuch"),
        ("s3://bucket", "names no directory; give one below it, such as s3://bucket/base"),
        ("file:///proc/base", "cannot write file:///proc/base"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            quantize(tiny_model, url, stage=tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    assert staged("s3://bucket/a/base/", tmp_path) == tmp_path / "base.upload"
    check_place(f"file://{tmp_path}/new", overwrite=False, resume=False)
    assert list((tmp_path / "new").iterdir()) == []


# ---- a server of S3's protocol ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """The environment in which s3://bucket is there."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    server = pytest.importorskip("moto.server", reason="needs moto with flask").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    found = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
             "AWS_ENDPOINT_URL": f"http://{host}:{port}", "OMP_NUM_THREADS": "1"}  # fmt: skip
    storage(found).mkdir("bucket")
    yield found
    server.stop()


def storage(bucket: dict[str, str]) -> Any:
    return fsspec.filesystem(
        "s3", key="key", secret="secret", endpoint_url=bucket["AWS_ENDPOINT_URL"], skip_instance_cache=True
    )


def command(model: str, stage: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "bitloft.cli", "quantize", f"s3://bucket/{model}", "--out", "s3://bucket/base",
            "--format", "lm2:64", "--rank", "4", "--stage", str(stage), *words]  # fmt: skip


def test_quantize_on_ray_reads_from_s3_and_writes_to_it(
    bucket: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    """Driver and workers see the bucket alone. The first run is killed in the middle; the next one goes on."""
    pytest.importorskip("ray", reason="needs Ray (pip install 'bitloft[ray]')")
    storage(bucket).put(str(tiny_model) + "/", f"bucket/{tiny_model.name}", recursive=True)
    ray, env = ("--engine", "ray", "--jobs", "2"), os.environ | bucket
    journal = tmp_path / "base.upload.work" / "journal.jsonl"
    first = subprocess.Popen(
        command(tiny_model.name, tmp_path, *ray), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while first.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert storage(bucket).find("bucket/base") == []
    done = subprocess.run(command(tiny_model.name, tmp_path, *ray, "--resume"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = fetched(storage(bucket), "bucket/base", tmp_path / "base")
    read_manifest(found, "base")
    quantize(tiny_model, tmp_path / "here" / "base", **SETTINGS)
    assert contents(found) == contents(tmp_path / "here" / "base")
    assert not journal.parent.exists()


def test_a_bucket_that_is_not_there_is_one_sentence(bucket: dict[str, str], tmp_path: Path) -> None:
    words = command("model", tmp_path)
    words[words.index("s3://bucket/base")] = "s3://elsewhere/base"
    done = subprocess.run(words, env=os.environ | bucket, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot write s3://elsewhere/base" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
