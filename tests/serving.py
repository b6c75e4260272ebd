"""A small base with adapters that never answer alike, served from a thread of the test process."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitloft.adapters import WEIGHTS_FILE, PackedBlock, PackedModule, serialize
from bitloft.compress import compress
from bitloft.integrations.record import base_record
from bitloft.kernels.ops import encode
from bitloft.options import ServeOptions
from bitloft.quantize import quantize
from bitloft.serve.backend import NativeRows, Piece
from bitloft.serve.engine import Engine
from bitloft.serve.http import Server, background, open_service
from bitloft.serve.service import Service
from tests.helpers import make_adapter, tiny_llama, write_record

CHAT: list[Any] = [{"role": "user", "content": "what is the capital of france ?"}]
PACKED, PLAIN = ("alpha", "beta", "gamma"), "delta"
NAMES = ("base", *PACKED, PLAIN)  # what the server lists


def make_base(directory: Path) -> Path:
    """A packed base named ``base`` below ``directory``."""
    quantize(tiny_llama(directory / "model"), directory / "base", format="lm4:64", rank=4)
    return directory / "base"


def make_adapters(directory: Path, base: Path) -> Path:
    """Three packed adapters, a plain one, and five directories that cannot be served."""
    out = directory / "adapters"
    for seed, name in enumerate(PACKED):
        compress(make_adapter(directory / "plain" / name, seed=seed, scale=1.0, base=base), out / name, bits=4.0)
    make_adapter(out / PLAIN, seed=9, scale=1.0, base=base)
    (out / "empty").mkdir()
    (out / "not a name").mkdir()
    write_record(make_adapter(out / "foreign"), "f" * 64, None)
    poison = make_adapter(out / "poison", base=base)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    bad = {f"{name}.lora_A.weight": torch.full((4, 64), torch.nan), f"{name}.lora_B.weight": torch.ones(64, 4)}
    save_file(bad, poison / WEIGHTS_FILE)
    (out / "outside").symlink_to(directory / "plain" / "alpha", target_is_directory=True)
    (out / "note.txt").write_text("a file is nobody's adapter", encoding="utf-8")
    return out


def write_signature(directory: Path, base: Path, seed: int, *, exponent: int = 0) -> Path:
    """A packed adapter that names itself: it poisons keys and values for everybody else, and its last layer pushes one
    of two tokens of its own, by the sign of what it reads. The push leaves little of the base, so that the two
    likeliest tokens are far apart. ``exponent`` makes both factors larger by a power of two."""
    generator = torch.Generator().manual_seed(seed)
    found = base_record(base)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    directions = embedding / embedding.norm(dim=1, keepdim=True)
    widths = {"self_attn.k_proj": (64, 32), "self_attn.v_proj": (64, 32), "mlp.down_proj": (96, 64)}
    modules = []
    for layer in range(2):
        for name, (columns, rows) in widths.items():
            a = torch.randn(2, columns, generator=generator)
            bt = torch.randn(2, rows, generator=generator) / 2
            if name == "mlp.down_proj" and layer == 1:
                first, second = (60 + seed) % len(directions), (61 + seed + seed * seed) % len(directions)
                bt[0] = 2000 * (directions[first] - directions[second])
            block = PackedBlock(encode(a, "lm4:row"), encode(bt, "lm4:row"))
            for side in (block.a, block.bt):
                side.exponent.add_(exponent)
            modules.append(PackedModule(f"model.layers.{layer}.{name}", columns, rows, (block,), rank=2))
    values = sum(m.rank * (m.in_features + m.out_features) for m in modules)
    record = {"base": found.fingerprint, "source": found.source, "start": "frozen", "method": {"name": "signature"},
              "values": values, "error": 0.0}  # fmt: skip
    directory.mkdir(parents=True)
    for name, data in serialize({"peft_type": "LORA", "r": 2}, modules, record).items():
        (directory / name).write_bytes(data)
    return directory


def signatures(directory: Path, base: Path, count: int) -> list[Path]:
    """So many signature adapters, s000, s001, ..."""
    return [write_signature(directory / f"s{seed:03d}", base, seed) for seed in range(count)]


def slowed(patch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Let every step of every engine take ``seconds`` longer; the list that is returned grows by the rows of each."""
    run, rows = NativeRows.run, list[int]()

    def slowly(self: NativeRows, pieces: Sequence[Piece]) -> torch.Tensor:
        time.sleep(seconds)
        rows.append(len(pieces))
        return run(self, pieces)

    patch.setattr(NativeRows, "run", slowly)
    return rows


def failing(patch: pytest.MonkeyPatch, message: str, after: int = 0) -> None:
    """Let every step raise, but the first ``after`` ones."""
    run, done = NativeRows.run, list[int]()

    def fail(self: NativeRows, pieces: Sequence[Piece]) -> torch.Tensor:
        done.append(len(pieces))
        if len(done) <= after:
            return run(self, pieces)
        raise RuntimeError(message)

    patch.setattr(NativeRows, "run", fail)


@dataclass
class World:
    """The served directories, the service that serves them and the server's address."""

    base: Path
    adapters: Path
    service: Service
    url: str
    said: list[str]

    @property
    def engine(self) -> Engine:
        assert isinstance(self.service.engine, Engine)
        return self.service.engine

    def alone(self, prompt: Sequence[int], adapter: str, tokens: int) -> str:
        """The greedy answer as transformers' own ``generate`` gives it to this one prompt: the oracle."""
        store, model = self.service.store, self.engine.model
        ids = torch.tensor([list(prompt)])
        with store.holding(adapter) as keys, store.bank.rows(keys):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return self.decode(out[0, len(prompt) :])

    def decode(self, ids: Any) -> str:
        return str(self.service.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode(self, text: str) -> list[int]:
        return list(self.service.tokenizer(text)["input_ids"])

    def chat_ids(self) -> list[int]:
        """Token ids of CHAT."""
        ids: Any = self.service.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        return list(ids)

    @contextmanager
    def engine_with(self, **settings: Any) -> Iterator[Engine]:
        """Another engine over the same model and adapters, not started."""
        options = ServeOptions(**settings)
        engine = Engine(self.engine.model, self.service.tokenizer, self.service.store, options)
        try:
            yield engine
        finally:
            engine.stop()

    @contextmanager
    def server_with(self, **settings: Any) -> Iterator[Server]:
        """Another server over the same model and adapters."""
        with self.engine_with(port=0, **settings) as engine:
            service = Service(engine, self.service.store, self.service.tokenizer, engine.options)
            with background(service, lambda line: None) as server:
                yield server


@contextmanager
def serving(directory: Path) -> Iterator[World]:
    """Make everything below ``directory`` and serve it until the end of the block."""
    base = make_base(directory)
    adapters = make_adapters(directory, base)
    said: list[str] = []
    service = open_service(base, adapters, ServeOptions(port=0, max_queue=1000), said.append)
    with background(service, said.append) as server:
        yield World(base, adapters, service, server.url, said)
    service.store.close()


@contextmanager
def process(base: Path, adapters: Path, *flags: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """``bitloft serve`` in a process of its own, and its address."""
    command = [
        "-m",
        "bitloft.cli",
        "serve",
        str(base),
        "--adapter-dir",
        str(adapters),
        "--port",
        "0",
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env)
    try:
        if found.stderr is None:
            raise RuntimeError("no pipe")
        line = next(line for line in found.stderr if line.startswith("serving"))
        yield found, line.split(" at ")[1].split(" ")[0]
    finally:
        found.kill()
        found.communicate()


def connect(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


def raw(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request by hand: status, headers, body. A dict is sent as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
    data = json.dumps(body) if isinstance(body, dict) else body
    try:
        given = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, data, given)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def error_of(body: bytes) -> dict[str, Any]:
    """The error in a body, which has the OpenAI shape and nothing of this machine."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "pytest" not in error["message"]  # part of every path of a test
    assert "Traceback" not in error["message"]
    return dict(error)


def until(condition: Any, seconds: float = 30) -> None:
    """Wait for a condition; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
