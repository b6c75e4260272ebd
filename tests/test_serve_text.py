"""Text as it streams: whole characters, no stop string, and together what decoding at once gives."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bitloft.serve.text import UNFINISHED, TextStream

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def streamed(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces shown, and whether a stop string ended them."""
    stream, pieces = TextStream(tokenizer, stop), []
    for token in ids:
        text, stopped = stream.add(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    return [*pieces, stream.finish()], False


@MANY
@given(ids=st.lists(st.integers(0, 319), max_size=30))
def test_the_pieces_are_the_text(tokenizer: Any, ids: list[int]) -> None:
    pieces, stopped = streamed(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids)
    assert not stopped


@MANY
@given(text=st.text(st.sampled_from("aé漢🙂 \n.the"), max_size=12))
def test_no_half_character_is_shown(tokenizer: Any, text: str) -> None:
    pieces, _ = streamed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert UNFINISHED not in "".join(pieces)
    assert "".join(pieces) == text


@MANY
@given(data=st.data(), text=st.text(st.sampled_from("ab\n "), min_size=1, max_size=25))
def test_a_stop_string_and_what_follows_are_never_shown(tokenizer: Any, data: st.DataObject, text: str) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 4))]
    pieces, _ = streamed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], (stop,))
    assert "".join(pieces) == text[: text.index(stop)]


@MANY
@given(text=st.text(st.sampled_from("abc"), max_size=25), stop=st.text(st.sampled_from("abc"), min_size=1, max_size=4))
def test_text_is_held_only_while_it_may_become_a_stop_string(tokenizer: Any, text: str, stop: str) -> None:
    stream, shown = TextStream(tokenizer, (stop,)), ""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for n, token in enumerate(ids, 1):
        piece, stopped = stream.add(token)
        shown += piece
        if stopped:
            return
        assert stop.startswith(whole(tokenizer, ids[:n]).removeprefix(shown))


def test_the_stop_string_that_ends_first_wins(tokenizer: Any) -> None:
    ids = tokenizer("a b c d e", add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, ids, ("d", "b c"))[0][-1:] != ["d"]
    pieces, stopped = streamed(tokenizer, ids, ("d", "b c"))
    assert ("".join(pieces), stopped) == ("a ", True)


def test_an_unfinished_character_comes_at_the_end(tokenizer: Any) -> None:
    half = tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    stream = TextStream(tokenizer)
    assert stream.add(half[0]) == ("", False)
    assert stream.finish() == UNFINISHED
