"""`bitloft serve` as its users meet it: a process of its own, the openai client, a SIGTERM at the end."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

START_SECONDS = 180.0
STOP_SECONDS = 60.0
ADDRESS = re.compile(r"serving .* at (\S+)")


def talk(base: Path, adapters: Path, names: Sequence[str], prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    """Start the server, list its models, ask every adapter its prompt (the last one streamed too), stop it.

    Raises RuntimeError with what the server said where it does not start.
    """
    from openai import OpenAI

    began = time.perf_counter()
    command = [sys.executable, "-m", "bitloft.cli", "serve", str(base), "--adapter-dir", str(adapters), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url, log = address(process)
        ready = time.perf_counter() - began
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        found = ask(client, names, prompts, tokens)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=STOP_SECONDS)
    return found | {"ready_seconds": ready, "exit": code, "log": log}


def ask(client: Any, names: Sequence[str], prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    """What the openai client gets: model ids, an answer per adapter, and whether a stream adds up to the answer."""
    models = [item.id for item in client.models.list()]
    answers, used = [], 0
    for name, prompt in zip(names, prompts, strict=True):
        messages = [{"role": "user", "content": prompt}]
        whole = client.chat.completions.create(model=name, messages=messages, max_tokens=tokens, temperature=0)
        answers.append({"adapter": name, "prompt": prompt, "answer": whole.choices[0].message.content})
        used += whole.usage.completion_tokens
    began, first, pieces = time.perf_counter(), None, []
    stream = client.chat.completions.create(
        model=name, messages=messages, max_tokens=tokens, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            pieces.append(chunk.choices[0].delta.content)
    return {
        "models": models, "answers": answers, "tokens": used, "first_token_seconds": first,
        "stream_equal": "".join(pieces) == answers[-1]["answer"],
    }  # fmt: skip


def address(process: "subprocess.Popen[str]") -> tuple[str, list[str]]:
    """The URL that the server prints once it listens, and the lines before it."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=forward, args=(process.stderr, lines), daemon=True).start()
    log: list[str] = []
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            continue
        if line is None:
            break
        log.append(line.rstrip())
        if match := ADDRESS.search(line):
            return match[1], log
    raise RuntimeError("the server did not start:\n" + "\n".join(log[-20:]))


def forward(stream: IO[str] | None, lines: "queue.Queue[str | None]") -> None:
    """Pass every line on and None at the end; goes on reading, so that the server never blocks on a full pipe."""
    for line in stream or ():
        lines.put(line)
    lines.put(None)
