"""Request bodies in the OpenAI shape, strictly: a field that would change the answer and is not honoured is refused.

Ignoring unknown fields, as most servers do, gives a client that asks for ``logit_bias`` an answer without it and no
sign of that. Fields in HARMLESS change no answer and are ignored; a field at its NEUTRAL value asks for nothing.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from bitloft.serve.requests import RequestError

HARMLESS = frozenset({"user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier"})
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
CHOICES = 4  # answers to one prompt
PROMPTS = 16  # prompts of one completion request
INPUTS = 256  # texts of one embedding or classification request
LIKELIEST = 20  # tokens that log-probabilities name at most


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


class Named(Strict):
    """What every request names: the base or an adapter."""

    model: str


class Body(Named):
    """What both kinds of completion take. ``top_k`` is no field of OpenAI's; other servers spell it so (-1: all)."""

    max_tokens: int | None = Field(None, gt=0, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=CHOICES)
    stop: Annotated[list[StopString], Field(max_length=4), BeforeValidator(_listed)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def limit(self) -> int | None:
        """Tokens that the answer may have, None where the client does not say."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """Tokens whose log-probabilities are told at every place, None for no log-probabilities at all."""
        return None


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1, max_length=128)
    max_completion_tokens: int | None = Field(None, gt=0, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=LIKELIEST)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


Tokens = Annotated[list[int], Field(min_length=1)]


class CompletionBody(Body):
    prompt: str | list[int] | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=LIKELIEST)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or token ids."""
        return _several(self.prompt)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class InputBody(Named):
    """Texts for an encoder: one, or a batch of them, each a text or token ids."""

    input: str | list[int] | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=INPUTS)]

    @property
    def inputs(self) -> list[str | list[int]]:
        return _several(self.input)


class EmbeddingBody(InputBody):
    encoding_format: Literal["float", "base64"] = "float"


class ClassifyBody(InputBody):
    pass


class AdapterBody(Strict):
    """An adapter to add: the name of a subdirectory of the adapter directory, never a path."""

    name: str
    replace: bool = False


def _several(given: Any) -> list[str | list[int]]:
    one = isinstance(given, str) or (isinstance(given, list) and not (given and isinstance(given[0], str | list)))
    return [given] if one else given


Kind = TypeVar("Kind", bound=Strict)


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
        told = f"{where}: {worst['msg']}" if where else worst["msg"]
        raise RequestError("invalid_value", f"{told}.", str(worst["loc"][0]) if where else worst["type"]) from None


def _asks_nothing(name: str, value: Any) -> bool:
    """A field that is ignored on purpose, null, or at the value that means its absence."""
    if name in HARMLESS or value is None:
        return True
    return name in NEUTRAL and value == NEUTRAL[name]
