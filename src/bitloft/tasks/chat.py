"""Messages to token ids through the tokenizer's chat template: one function for training and for serving.

The mask for training comes from rendering prefixes: the text rendered before an assistant's turn (with the generation
prompt) must begin the text rendered after it, and that must begin the whole. A template that rewrites earlier turns
(some drop earlier reasoning) breaks this and is refused, for its mask would be wrong without a sign of it. The
alternative, ``{% generation %}`` marks inside the template, exists in few templates.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bitloft.errors import DataError

Messages = Sequence[dict[str, str]]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation; with ``add_generation_prompt`` the last ids open the assistant's next turn.

    Raises DataError where the tokenizer has no chat template or its template refuses the conversation.
    """
    return _ids(tokenizer, render_chat(tokenizer, messages, add_generation_prompt))


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool) -> str:
    """The text that ``encode_chat`` tokenizes; same errors."""
    if not tokenizer.chat_template:
        raise DataError(
            "this tokenizer has no chat template, so messages cannot be encoded; use rows with prompt and completion."
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses this conversation: {error}") from None
    return str(text)


def encode_chat_labels(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and which of them are the assistant's (what the loss is taken on).

    A turn counts from the first token after the generation prompt up to and with its end token. Raises DataError
    where the template violates the prefix property.
    """
    whole = render_chat(tokenizer, messages, add_generation_prompt=False)
    ids = _ids(tokenizer, whole)
    target = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True) if i else ""
        after = render_chat(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not after.startswith(before) or not whole.startswith(after):
            raise DataError(
                f"the tokenizer's chat template renders message {i + 1} differently once later messages follow, so "
                "the loss cannot be restricted to the assistant's turns; split the conversation into rows of one turn."
            )
        first, end = _shared(_ids(tokenizer, before), ids), _shared(_ids(tokenizer, _ended(tokenizer, after)), ids)
        target[first:end] = [True] * (end - first)
    return ids, target


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` up to its end token: the line break that templates put after it is never generated."""
    stripped = text.rstrip()
    return stripped if any(stripped.endswith(token) for token in tokenizer.all_special_tokens) else text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(found)


def _shared(prefix: list[int], ids: list[int]) -> int:
    """How many leading ids agree: tokens may merge across the border, and a merged one belongs to the later part."""
    return next((n for n, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids)))
