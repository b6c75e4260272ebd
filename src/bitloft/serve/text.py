"""Tokens to text as they come: whole characters only, and nothing that may yet become a stop string.

The new text of a token is decode(ids[prefix:]) minus decode(ids[prefix:read]), with ``prefix`` the start of the last
piece shown: so a tokenizer that treats a sequence's first token differently (sentencepiece drops its space) is right,
and the cost does not grow with the answer. Text that ends in U+FFFD is an unfinished character and waits.
"""

from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer. ``add`` a token and get what may be shown; ``finish`` gives what was held back."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self._ids: list[int] = []
        self._prefix = self._read = 0
        self._held = ""  # decoded, but it may begin a stop string

    def add(self, token: int) -> tuple[str, bool]:
        """The text that this token releases, and whether a stop string ended the answer (it is cut off)."""
        self._ids.append(token)
        return self._release(self._decode(final=False))

    def finish(self) -> str:
        """The rest, unfinished characters included; a stop string that they complete is cut off too."""
        text, stopped = self._release(self._decode(final=True))
        held, self._held = self._held, ""
        return text if stopped else text + held

    def _decode(self, final: bool) -> str:
        before = self.decode(self._ids[self._prefix : self._read])
        after = self.decode(self._ids[self._prefix :])
        if after.endswith(UNFINISHED) and not final:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens by themselves; an unfinished character is U+FFFD."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        hold = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
