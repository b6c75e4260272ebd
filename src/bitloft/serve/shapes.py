"""Answers in the OpenAI shape: whole ones, pieces of a stream, vectors, model cards and errors.

Classification has no shape of OpenAI's; it is written as vLLM writes it.
"""

import base64
import json
import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from starlette.responses import JSONResponse

from bitloft.serve.requests import RequestError, TokenLogprob

INVALID, SERVER = "invalid_request_error", "server_error"
# code of a RequestError -> HTTP status and the API's error type
STATUS = {
    "invalid_value": (400, INVALID),
    "unsupported_parameter": (400, INVALID),
    "unsupported_model": (400, INVALID),
    "context_length_exceeded": (400, INVALID),
    "invalid_api_key": (401, INVALID),
    "model_not_found": (404, INVALID),
    "not_found": (404, INVALID),
    "method_not_allowed": (405, INVALID),
    "body_timeout": (408, INVALID),
    "adapter_exists": (409, INVALID),
    "body_too_large": (413, INVALID),
    "unsupported_media_type": (415, INVALID),
    "host_not_served": (421, INVALID),
    "adapter_invalid": (422, INVALID),
    "headers_too_large": (431, INVALID),
    "queue_full": (429, "rate_limit_error"),
    "engine_error": (500, SERVER),
    "adapter_numerical_error": (500, SERVER),
    "adapter_capacity": (503, SERVER),
    "shutting_down": (503, SERVER),
    "queue_timeout": (503, SERVER),
    "request_timeout": (503, SERVER),
}
RETRY_SECONDS = {429: 1, 503: 5}
NEVER = -9999.0  # what OpenAI writes for the logarithm of a probability that is zero; JSON has no infinity


@dataclass(frozen=True)
class Shape:
    """How one answer is written. ``chat`` decides between messages and plain text."""

    id: str
    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A complete answer of ``choice``s."""
        return self._answer("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage}

    def choice(
        self, index: int, text: str, finish: str, logprobs: Sequence[TokenLogprob] | None = None
    ) -> dict[str, Any]:
        """One complete choice; ``logprobs`` is None where they were not asked for."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return self._choice(index, content, finish, logprobs)

    def piece(
        self,
        text: str,
        finish: str | None,
        *,
        index: int = 0,
        first: bool = False,
        logprobs: Sequence[TokenLogprob] | None = None,
        usage: bool = False,
    ) -> dict[str, Any]:
        """A part of a streamed answer; the first of a chat says whose turn it is. With ``usage`` the stream's last
        part will have it, and every other one says null."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        found = self._answer(
            kind, [self._choice(index, {"delta": delta} if self.chat else {"text": text}, finish, logprobs)]
        )
        return found | {"usage": None} if usage else found

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last part of a stream whose client asked for usage: no choice, only the counts."""
        return self._answer("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": usage}

    def _answer(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(
        self, index: int, content: dict[str, Any], finish: str | None, logprobs: Sequence[TokenLogprob] | None
    ) -> dict[str, Any]:
        told = None if logprobs is None else _of_chat(logprobs) if self.chat else _of_text(logprobs)
        return {"index": index, **content, "logprobs": told, "finish_reason": finish}


def _of_chat(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        known = "\N{REPLACEMENT CHARACTER}" not in text  # a token that is part of a character has no text of its own
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if known else None}

    found = [
        entry(one.text, one.logprob) | {"top_logprobs": [entry(text, value) for _, text, value in one.top]}
        for one in logprobs
    ]
    return {"content": found, "refusal": None}


def _of_text(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    tokens = [one.text for one in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        "top_logprobs": [{text: _finite(value) for _, text, value in one.top} for one in logprobs],
        "text_offset": [0, *accumulate(len(token) for token in tokens)][: len(tokens)],
    }


def _finite(value: float) -> float:
    return value if math.isfinite(value) else NEVER


def embeddings(model: str, vectors: Sequence[Sequence[float]], tokens: int, packed: bool) -> dict[str, Any]:
    """Vectors as OpenAI lists them; ``packed`` writes each as base64 of little-endian float32."""
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector) if packed else list(vector)}
        for i, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _base64(vector: Sequence[float]) -> str:
    values = array("f", vector)
    if memoryview(b"\1\0").cast("H")[0] != 1:
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


def classes(
    id: str, model: str, labels: Sequence[str], probabilities: Sequence[Sequence[float]], tokens: int
) -> dict[str, Any]:
    """For each text the likeliest label and the probabilities of all, in the order of ``labels``."""
    data = [
        {"index": i, "label": labels[max(range(len(p)), key=p.__getitem__)], "probs": list(p), "num_classes": len(p)}
        for i, p in enumerate(probabilities)
    ]
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    return {
        "id": f"classify-{id}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "labels": list(labels),
        "data": data,
        "usage": usage,
    }


def frame(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"


DONE = "data: [DONE]\n\n"


def error_body(error: RequestError) -> dict[str, Any]:
    kind = STATUS[error.code][1]
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """Status, body and, where it makes sense to try again, when."""
    status = STATUS[error.code][0]
    headers = {}
    if status in RETRY_SECONDS:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or RETRY_SECONDS[status])))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


def model_card(name: str, base: str, created: int, note: str | None = None) -> dict[str, Any]:
    """An entry of /v1/models: adapters have the base as parent. Paths are nobody's business. ``note`` tells of a base
    mismatch."""
    parent = None if name == base else base
    card = {"id": name, "object": "model", "created": created, "owned_by": "bitloft", "root": name, "parent": parent}
    return card if note is None else card | {"base_mismatch": note}
