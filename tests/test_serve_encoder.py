"""Classifiers and embedding models: each text as it is alone, whatever is computed beside it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from bitloft.errors import CheckpointError
from bitloft.integrations.record import BaseRecord
from bitloft.modules.multi import AdapterBank
from bitloft.options import ServeOptions
from bitloft.serve.encoder import Encoder, is_encoder
from bitloft.serve.requests import RequestError
from bitloft.serve.store import AdapterStore
from tests.test_multi import linears, packed_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 40, "num_labels": 3,
}  # fmt: skip
TEXTS = [[5, 6, 7], [9] * 20, [11, 3], [5, 6, 7, 8, 9]]
NAMES = ["one", None, "two", "one"]


class Tokenizer:
    pad_token_id = 0


def encoder(model: Any, **given: Any) -> Encoder:
    bank = AdapterBank(model.eval())
    store = AdapterStore(bank, BaseRecord(Path("."), "f" * 64, None, {}), "base", ServeOptions(**given))
    for seed, name in enumerate(("one", "two")):
        version = store.residency.version(f"key-{name}", Path(name), 1000)
        bank.attach(version.key, packed_adapter(model, [n for n in linears(model) if "layer.1" in n], seed=seed))
        store.residency.name(version, 1)
        version.resident = True
        store.residency._recent[version.key] = version
        from bitloft.serve.store import _Entry

        store._entries[name] = _Entry(version)
    return Encoder(model, Tokenizer(), store, ServeOptions(**given))


@pytest.fixture(scope="module")
def classifier() -> Iterator[Encoder]:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, id2label={0: "no", 1: "perhaps", 2: "yes"}, label2id={"no": 0, "perhaps": 1, "yes": 2})
    made = encoder(BertForSequenceClassification(config))
    made.start()
    yield made
    made.stop()


def ask(found: Encoder, texts: list[list[int]], names: list[str | None]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        jobs = [found.run(text, name) for text, name in zip(texts, names, strict=True)]
        return await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 60)

    return asyncio.run(all_of_them())


def test_classes_of_mixed_adapters(classifier: Encoder) -> None:
    assert (classifier.kind, classifier.labels) == ("classify", ("no", "perhaps", "yes"))
    answers = ask(classifier, TEXTS, NAMES)
    for text, name, found in zip(TEXTS, NAMES, answers, strict=True):
        keys = [f"key-{name}" if name else None]
        with torch.no_grad(), classifier.store.bank.rows(keys):
            logits = classifier.model(input_ids=torch.tensor([text])).logits[0]
        assert found.logits == pytest.approx(logits.tolist(), abs=1e-4)
        assert found.probabilities == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)
        assert (found.embedding, found.tokens) == ([], len(text))
    same = ask(classifier, [TEXTS[0]] * 3, ["one", "two", None])
    assert len({tuple(round(x, 3) for x in found.logits) for found in same}) == 3
    assert classifier.store.find("one").answer_tokens == 0 < classifier.store.find("one").prompt_tokens
    assert classifier.store.find("one").refs == 0
    assert classifier.stats().rows >= 7


def test_embeddings_are_means_of_their_own_tokens() -> None:
    torch.manual_seed(0)
    found = encoder(BertModel(BertConfig(**SIZES)))
    found.start()
    answers = ask(found, TEXTS, [None] * 4)
    found.stop()
    assert (found.kind, found.labels) == ("embed", ())
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            mean = found.model(input_ids=torch.tensor([text])).last_hidden_state[0].mean(0)
        assert answer.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-4)


def test_several_labels_at_once() -> None:
    config = BertConfig(**SIZES, problem_type="multi_label_classification")
    found = encoder(BertForSequenceClassification(config))
    found.start()
    (answer,) = ask(found, TEXTS[:1], [None])
    found.stop()
    assert answer.probabilities == pytest.approx(torch.tensor(answer.logits).sigmoid().tolist(), abs=1e-5)


def test_refusals(classifier: Encoder) -> None:
    texts: list[list[int]] = [[5], [], [5] * 41, [100]]
    found = ask(classifier, texts, ["nobody", None, None, None])
    assert [error.code for error in found] == [
        "model_not_found", "invalid_value", "context_length_exceeded", "invalid_value",
    ]  # fmt: skip
    assert classifier.stats().refused["invalid_value"] == 2


def test_numbers_that_overflow_end_alone() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    found = encoder(model)
    forward = model.forward

    def poisoned(**kwargs: Any) -> Any:
        out = forward(**kwargs)
        out.logits[kwargs["input_ids"][:, 0] == 9] = torch.nan
        return out

    model.forward = poisoned
    found.start()
    answers = ask(found, TEXTS[:3], ["two", "one", "two"])
    again = ask(found, TEXTS[:1], ["one"])
    found.stop()
    assert [isinstance(answer, RequestError) for answer in answers] == [False, True, False]
    assert answers[1].code == again[0].code == "adapter_numerical_error"


def test_a_full_queue_draining_and_the_end() -> None:
    found = encoder(BertModel(BertConfig(**SIZES)), max_queue=2)
    assert found.unready() == "the engine does not run"

    async def flood() -> list[Any]:
        jobs = [asyncio.create_task(found.run([5], None)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not found.idle
        found.start()
        return await asyncio.gather(*jobs, return_exceptions=True)

    answers = asyncio.run(flood())
    assert [isinstance(answer, RequestError) for answer in answers] == [False, False, True]
    assert answers[2].code == "queue_full"
    assert found.unready() is None
    found.drain()
    assert found.unready() == "shutting down"
    (late,) = ask(found, [[5]], [None])
    assert late.code == "shutting_down"
    found.stop()
    assert found.idle


def test_who_left_is_not_computed() -> None:
    found = encoder(BertModel(BertConfig(**SIZES)))

    async def leave() -> None:
        task = asyncio.create_task(found.run([5], "one"))
        await asyncio.sleep(0)
        assert found.store.find("one").refs == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found.start()
        while not found.idle:
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    found.stop()
    assert found.store.find("one").refs == 0
    assert found.stats().rows == 0


def test_what_is_an_encoder(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not is_encoder(model)
    with pytest.raises(CheckpointError, match="gives no vector for a text"):
        Encoder(model, Tokenizer(), encoder(BertModel(BertConfig(**SIZES))).store, ServeOptions())
