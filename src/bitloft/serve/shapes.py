"""Answers in the OpenAI shape: whole ones, pieces of a stream, model cards and errors."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from bitloft.serve.requests import RequestError

INVALID, SERVER = "invalid_request_error", "server_error"
# code of a RequestError -> HTTP status and the API's error type
STATUS = {
    "invalid_value": (400, INVALID),
    "unsupported_parameter": (400, INVALID),
    "context_length_exceeded": (400, INVALID),
    "invalid_api_key": (401, INVALID),
    "model_not_found": (404, INVALID),
    "not_found": (404, INVALID),
    "method_not_allowed": (405, INVALID),
    "body_timeout": (408, INVALID),
    "body_too_large": (413, INVALID),
    "unsupported_media_type": (415, INVALID),
    "headers_too_large": (431, INVALID),
    "adapter_exists": (409, INVALID),
    "adapter_invalid": (422, INVALID),
    "adapter_capacity": (503, SERVER),
    "queue_full": (429, "rate_limit_error"),
    "engine_error": (500, SERVER),
    "adapter_numerical_error": (500, SERVER),
    "shutting_down": (503, SERVER),
    "queue_timeout": (503, SERVER),
    "request_timeout": (503, SERVER),
}
RETRY_SECONDS = {429: "1", 503: "5"}


@dataclass(frozen=True)
class Shape:
    """How one answer is written. ``chat`` decides between messages and plain text."""

    id: str
    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """A complete answer."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._answer(kind, [self._choice(content, finish)]) | {"usage": usage}

    def piece(self, text: str, finish: str | None, first: bool = False) -> dict[str, Any]:
        """A part of a streamed answer; the first of a chat says whose turn it is."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._answer(kind, [self._choice({"delta": delta} if self.chat else {"text": text}, finish)])

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

    def _choice(self, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def frame(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"


def error_body(error: RequestError) -> dict[str, Any]:
    kind = STATUS[error.code][1]
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """Status, body and, where it makes sense to try again, when."""
    status = STATUS[error.code][0]
    headers = {"retry-after": RETRY_SECONDS[status]} if status in RETRY_SECONDS else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


def model_card(name: str, base: str, created: int, note: str | None = None) -> dict[str, Any]:
    """An entry of /v1/models: adapters have the base as parent. Paths are nobody's business. ``note`` tells of a base
    mismatch."""
    parent = None if name == base else base
    card = {"id": name, "object": "model", "created": created, "owned_by": "bitloft", "root": name, "parent": parent}
    return card if note is None else card | {"base_mismatch": note}
