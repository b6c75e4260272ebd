"""tasks/lm.py: labels, cuts and their counts, padding, and a loss that equals the plain one."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from bitloft.errors import DataError, OptionError
from bitloft.tasks import lm
from bitloft.tasks.lm import IGNORED, Collator, Example, batches, check_length, encode_rows, target_losses
from bitloft.tasks.rows import Row, read_rows
from tests.helpers import WORDS, tiny_tokenizer, write_rows

PAIR = {"prompt": "what is the capital of france ?", "completion": "paris ."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def rows(tmp_path: Path, *contents: Mapping[str, object]) -> list[Row]:
    return read_rows(write_rows(tmp_path / "rows.jsonl", [dict(row) for row in contents]))


def text_of(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return str(tokenizer.decode(example.labels[example.labels != IGNORED]))


def test_document_is_cut_into_blocks_and_nothing_is_lost(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    examples, report = encode_rows(rows(tmp_path, {"text": WORDS}), tokenizer, 16)
    ids = torch.cat([example.ids for example in examples])
    assert tokenizer.decode(ids) == WORDS + tokenizer.eos_token
    assert {len(example.ids) for example in examples[:-1]} == {16}
    assert (report.rows, report.examples, report.tokens) == (1, len(examples), len(ids))
    assert report.target_tokens == len(ids) - len(examples)  # the first token of a block has nothing before it
    assert report.sentences() == []


def test_plain_text_file_gets_no_end_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(WORDS, encoding="utf-8")
    examples, _ = encode_rows(read_rows(tmp_path / "book.txt"), tokenizer, 16)
    assert tokenizer.decode(torch.cat([example.ids for example in examples])) == WORDS


def test_prompt_goes_through_the_chat_template_and_is_masked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (example,), _ = encode_rows(rows(tmp_path, PAIR), tokenizer, 200)
    assert tokenizer.decode(example.ids) == (
        "<|im_start|>user\nwhat is the capital of france ?<|im_end|>\n<|im_start|>assistant\nparis .<|im_end|>\n"
    )
    assert text_of(tokenizer, example) == "paris .<|im_end|>"


def test_prompt_without_chat_template_is_put_before_the_completion(tmp_path: Path) -> None:
    plain = tiny_tokenizer(tmp_path)
    plain.chat_template = None
    (example,), _ = encode_rows(rows(tmp_path, PAIR), plain, 200)
    assert plain.decode(example.ids) == "what is the capital of france ?paris .<|im_end|>"
    assert text_of(plain, example) == "paris .<|im_end|>"
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*no chat template"):
        encode_rows(rows(tmp_path, PAIR, messages), plain, 200)


def test_every_cut_is_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    long_answer = {"prompt": "one", "completion": WORDS, "id": 1}
    long_prompt = {"prompt": WORDS, "completion": "two", "id": 2}
    examples, report = encode_rows(rows(tmp_path, PAIR, long_answer, long_prompt), tokenizer, 60)
    assert [example.row for example in examples] == [0, 1]
    assert (report.truncated_rows, report.rows_without_target, report.unused_keys) == (2, 1, {"id": 2})
    assert report.sentences() == [
        "2 of 3 rows were cut at the length; raise it to keep them whole.",
        "1 of 3 rows have nothing left to learn from after the cut and are not used.",
        "key 'id' of 2 rows is not used.",
    ]
    with pytest.raises(DataError, match=r"none of the 1 rows of .*rows\.jsonl has a token to learn from within 60"):
        encode_rows(rows(tmp_path, long_prompt), tokenizer, 60)


def test_length_beyond_the_models_positions_is_refused(model: LlamaForCausalLM) -> None:
    check_length(256, model.config)
    with pytest.raises(OptionError, match="length 257 is beyond the 256 positions"):
        check_length(257, model.config)


def test_collator_pads_on_the_right() -> None:
    one = Example(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 6, 7]), 0)
    two = Example(torch.tensor([8, 9]), torch.tensor([8, 9]), 1)
    batch = Collator(pad=3)([one, two])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, 9, IGNORED]]


def test_padding_id_of_a_tokenizer_without_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    assert Collator.for_tokenizer(tokenizer).pad == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert Collator.for_tokenizer(tokenizer).pad == tokenizer.eos_token_id


def test_batches_hold_every_example_once() -> None:
    examples = [Example(torch.arange(n + 2), torch.arange(n + 2), n) for n in range(7)]
    found = list(batches(examples, 3, Collator(0)))
    assert sorted(i for chosen, _ in found for i in chosen) == list(range(7))
    assert [len(chosen) for chosen, _ in found] == [3, 3, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), masked=st.floats(0, 0.9))
def test_losses_equal_those_over_all_logits(model: LlamaForCausalLM, seed: int, count: int, masked: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(count):
        ids = torch.randint(3, 300, (int(torch.randint(2, 20, (), generator=generator)),), generator=generator)
        keep = torch.rand(len(ids), generator=generator) >= masked
        keep[-1] = True
        examples.append(Example(ids, torch.where(keep, ids, IGNORED), row))
    batch = Collator(0)(examples)
    with torch.no_grad():
        losses, owners = target_losses(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    wanted = batch["labels"][:, 1:].flatten() != IGNORED
    torch.testing.assert_close(losses, plain[wanted], rtol=1e-4, atol=1e-5)
    assert torch.bincount(owners, minlength=count).tolist() == [example.targets for example in examples]


@pytest.mark.parametrize("chunk", [1, 70, 1 << 22])
def test_gradient_equals_that_of_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "CHUNK", chunk)
    logits = (3 * torch.randn(9, 23)).requires_grad_()
    labels = torch.randint(0, 23, (9,))
    weights = torch.rand(9)
    ours: torch.Tensor = lm._TokenLosses.apply(logits, labels)  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad((ours * weights).sum(), logits)
    plain = cross_entropy(logits, labels, reduction="none")
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, expected)


def test_divergences_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "CHUNK", 40)  # two rows at a time
    logits, wanted = torch.randn(7, 20, requires_grad=True), torch.randn(7, 20)
    weights = torch.rand(7)
    found = lm.divergences(logits, wanted)
    pair = logits.log_softmax(1), wanted.log_softmax(1)
    expected = torch.nn.functional.kl_div(*pair, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(found, expected)
    (mine,) = torch.autograd.grad(found @ weights, logits)
    (theirs,) = torch.autograd.grad(expected @ weights, logits)
    torch.testing.assert_close(mine, theirs)


def test_only_needed_positions_reach_the_head(model: LlamaForCausalLM) -> None:
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    ids = torch.arange(3, 23)
    labels = torch.full_like(ids, IGNORED)
    labels[-2:] = ids[-2:]
    target_losses(model, Collator(0)([Example(ids, labels, 0)]))
    handle.remove()
    assert seen == [2]
