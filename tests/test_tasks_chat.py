"""tasks/chat.py: the ids that serving sends are the ids that training masks, turn for turn."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bitloft.errors import DataError
from bitloft.tasks.chat import encode_chat, encode_chat_labels, render_chat
from tests.helpers import tiny_tokenizer

TALK = [
    {"role": "user", "content": "what is the capital of france ?"},
    {"role": "assistant", "content": "paris ."},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three four five"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_encoding_is_the_rendered_template(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_chat(tokenizer, TALK[:1], add_generation_prompt=True)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nwhat is the capital of france ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 2  # the template's own: none was put in front
    reference = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert ids == reference


def test_targets_are_the_assistants_turns_with_their_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, target = encode_chat_labels(tokenizer, TALK)
    assert ids == encode_chat(tokenizer, TALK, add_generation_prompt=False)
    assert tokenizer.decode([i for i, t in zip(ids, target, strict=True) if t]) == (
        "paris .<|im_end|>three four five<|im_end|>"
    )


def test_training_sequence_continues_what_serving_sends(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, target = encode_chat_labels(tokenizer, TALK)
    sent = encode_chat(tokenizer, TALK[:3], add_generation_prompt=True)
    assert ids[: len(sent)] == sent
    assert target[len(sent)]


def test_merge_across_the_border_belongs_to_the_answer(tmp_path: Path) -> None:
    """Where the tokenizer merges the prompt's last character with the answer's first, that token is a target."""
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = [{"role": "user", "content": "jumps over th"}, {"role": "assistant", "content": "e fox"}]
    ids, target = encode_chat_labels(tokenizer, talk)
    assert tokenizer.decode([i for i, t in zip(ids, target, strict=True) if t]) == " the fox"


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    forgetful = tiny_tokenizer(tmp_path)
    forgetful.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['role'] }}: {{ m['content'] }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="renders message 2 differently once later messages follow"):
        encode_chat_labels(forgetful, TALK)
    ids, target = encode_chat_labels(forgetful, TALK[:2])
    assert any(target)
    assert len(ids) == len(target)


def test_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    plain = tiny_tokenizer(tmp_path)
    plain.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template.*use rows with prompt and completion"):
        encode_chat(plain, TALK, add_generation_prompt=True)


def test_template_that_refuses_says_why(tmp_path: Path) -> None:
    strict = tiny_tokenizer(tmp_path)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses this conversation: roles must alternate"):
        render_chat(strict, TALK, add_generation_prompt=False)
