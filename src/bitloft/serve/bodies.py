"""Request bodies in the OpenAI shape, strictly: a field that would change the answer and is not honoured is refused.

Ignoring unknown fields, as most servers do, gives a client that asks for ``logit_bias`` an answer without it and no
sign of that. Fields in HARMLESS change no answer and are ignored; a field at its NEUTRAL value asks for nothing.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from bitloft.serve.requests import RequestError

HARMLESS = frozenset({"user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier"})
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


StopString = Annotated[str, Field(min_length=1, max_length=64)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, str]:
        """Role and text as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Body(Strict):
    """What both kinds of completion take."""

    model: str
    max_tokens: int | None = Field(None, gt=0, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopString], Field(max_length=4), BeforeValidator(_listed)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def limit(self) -> int | None:
        """Tokens that the answer may have, None where the client does not say."""
        return self.max_tokens


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1, max_length=128)
    max_completion_tokens: int | None = Field(None, gt=0, lt=2**31)

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(Body):
    prompt: str | list[int]


Kind = TypeVar("Kind", bound=Body)


def parse(kind: type[Kind], data: bytes) -> Kind:
    """Read a body. Raises RequestError (400) naming the field and what is wrong with it."""
    try:
        found = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError("invalid_value", f"the body is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise RequestError("invalid_value", "the body must be a JSON object.")
    known = {k: v for k, v in found.items() if k in kind.model_fields or not _asks_nothing(k, v)}
    unknown = next((name for name in known if name not in kind.model_fields), None)
    if unknown is not None:
        raise RequestError("unsupported_parameter", f"{unknown[:64]!r} is not supported; leave it out.", unknown[:64])
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        worst = max(found, key=lambda e: len(e["loc"]))  # of a field's alternatives the one that fits furthest
        where = ".".join(str(part) for part in worst["loc"])
        raise RequestError("invalid_value", f"{where}: {worst['msg']}.", str(worst["loc"][0])) from None


def _asks_nothing(name: str, value: Any) -> bool:
    """A field that is ignored on purpose, null, or at the value that means its absence."""
    if name in HARMLESS or value is None:
        return True
    return name in NEUTRAL and value == NEUTRAL[name]
