"""Embeddings and classes over HTTP, with the official client where it has a method for them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.options import ServeOptions
from bitloft.quantize import quantize
from bitloft.serve.http import Server, background, open_service
from tests.browser import browsing
from tests.helpers import tiny_tokenizer, write_record
from tests.serving import World, connect, error_of, raw, until

TEXTS = ["one two three", "the quick brown fox jumps over the lazy dog", "paris"]


def make(directory: Path, kind: type[PreTrainedModel]) -> Path:
    """A tiny encoder, packed, with two adapters in ``adapters``."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(directory / "model")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64, num_labels=3, id2label={0: "no", 1: "maybe", 2: "yes"},
        label2id={"no": 0, "maybe": 1, "yes": 2},
    )  # fmt: skip
    kind(config).save_pretrained(directory / "model")
    quantize(directory / "model", directory / "base", format="lm4:64", rank=4)
    prefix = "base_model.model." + ("bert." if kind is BertForSequenceClassification else "")
    record = base_record(directory / "base")
    for seed, name in enumerate(("first", "second")):
        generator = torch.Generator().manual_seed(seed)
        place = directory / "adapters" / name
        place.mkdir(parents=True)
        tensors = {}
        for layer in range(2):
            for part in ("query", "value"):
                key = f"{prefix}encoder.layer.{layer}.attention.self.{part}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
                tensors[f"{key}.lora_B.weight"] = torch.randn(64, 4, generator=generator) / 4
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config_of = {
            "peft_type": "LORA", "task_type": None, "r": 4, "lora_alpha": 8, "bias": "none",
            "base_model_name_or_path": "tiny", "target_modules": ["query", "value"], "modules_to_save": None,
        }  # fmt: skip
        (place / "adapter_config.json").write_text(json.dumps(config_of), encoding="utf-8")
        write_record(place, record.fingerprint, record.source)
    return directory / "base"


def serving(directory: Path, kind: type[PreTrainedModel]) -> Iterator[Server]:
    base = make(directory, kind)
    service = open_service(base, directory / "adapters", ServeOptions(port=0), lambda line: None)
    with background(service, lambda line: None) as server:
        yield server
    service.store.close()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serving(tmp_path_factory.mktemp("embedder"), BertModel)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serving(tmp_path_factory.mktemp("classifier"), BertForSequenceClassification)


def oracle(server: Server, text: str, adapter: str | None) -> Any:
    """The model's output for one text alone, through PEFT's own forward."""
    directory = server.service.adapter_dir
    assert directory is not None
    base = directory.parent / "base"
    model: Any = load(base)
    ids = torch.tensor([load_tokenizer(base)(text)["input_ids"]])
    with torch.no_grad():
        model = PeftModel.from_pretrained(model, directory / adapter).eval() if adapter else model
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_embeddings(embedder: Server) -> None:
    with connect(embedder.url) as client:
        for name in ("base", "first", "second"):
            found = client.embeddings.create(model=name, input=TEXTS)  # asks for base64 by itself
            plain = client.embeddings.create(model=name, input=TEXTS, encoding_format="float")
            assert [entry.index for entry in found.data] == [0, 1, 2]
            for text, entry, other in zip(TEXTS, found.data, plain.data, strict=True):
                states = oracle(embedder, text, None if name == "base" else name).last_hidden_state[0]
                expected = torch.nn.functional.normalize(states.mean(0), dim=-1)
                torch.testing.assert_close(torch.tensor(entry.embedding), expected, atol=1e-4, rtol=1e-3)
                torch.testing.assert_close(torch.tensor(other.embedding), expected, atol=1e-4, rtol=1e-3)
            assert found.usage.prompt_tokens == sum(len(embedder.service.tokenizer(t)["input_ids"]) for t in TEXTS)
        one = client.embeddings.create(model="first", input=TEXTS[0]).data
        ids = client.embeddings.create(model="first", input=[embedder.service.tokenizer(TEXTS[0])["input_ids"]]).data
        assert one[0].embedding == pytest.approx(ids[0].embedding, abs=1e-5)


def test_classes(classifier: Server) -> None:
    for name in ("base", "first"):
        status, _, data = raw(classifier.url, "POST", "/v1/classify", {"model": name, "input": TEXTS})
        found = json.loads(data)
        assert (status, found["labels"], found["model"]) == (200, ["no", "maybe", "yes"], name)
        for text, entry in zip(TEXTS, found["data"], strict=True):
            logits = oracle(classifier, text, None if name == "base" else name).logits[0]
            assert entry["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)
            assert entry["label"] == found["labels"][int(logits.argmax())]
            assert entry["num_classes"] == 3


def test_a_large_batch_is_taken_in_pieces(embedder: Server) -> None:
    """More texts than the queue holds: a request never has more than a part of them in it."""
    assert embedder.service.options.max_queue >= 32
    status, _, data = raw(embedder.url, "POST", "/v1/embeddings", {"model": "first", "input": ["one"] * 256})
    assert status == 200
    assert len(json.loads(data)["data"]) == 256
    status, _, data = raw(embedder.url, "POST", "/v1/embeddings", {"model": "first", "input": ["one"] * 257})
    assert (status, error_of(data)["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/embeddings", {"model": "nobody", "input": "one"}, 404, "model_not_found"),
        ("/v1/embeddings", {"model": "base", "input": ["one", "two " * 100]}, 400, "context_length_exceeded"),
        ("/v1/embeddings", {"model": "base", "input": []}, 400, "invalid_value"),
        ("/v1/embeddings", {"model": "base", "input": [10**6]}, 400, "invalid_value"),
        ("/v1/embeddings", {"model": "base", "input": "one", "dimensions": 8}, 400, "unsupported_parameter"),
        ("/v1/embeddings", {"model": "base", "input": "one", "encoding_format": "hex"}, 400, "invalid_value"),
        ("/v1/classify", {"model": "base", "input": "one"}, 400, "unsupported_model"),
        ("/v1/completions", {"model": "base", "prompt": "one"}, 400, "unsupported_model"),
    ],
)
def test_refusals(embedder: Server, path: str, body: dict[str, Any], status: int, code: str) -> None:
    found, _, data = raw(embedder.url, "POST", path, body)
    assert (found, error_of(data)["code"]) == (status, code)
    until(lambda: embedder.service.engine.idle)


def test_a_base_that_writes_text_has_no_vectors(world: World) -> None:
    with connect(world.url) as client, pytest.raises(openai.BadRequestError, match="ask /v1/completions"):
        client.embeddings.create(model="base", input="one")


def test_the_page_of_an_encoder_has_nothing_to_compare(embedder: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as browser:
        browser.open(embedder.url.removesuffix("v1"))
        browser.until("document.querySelectorAll('#rows tr').length === 3")
        assert browser.run("document.getElementById('compare').hidden")
        assert not browser.errors


def test_figures_of_an_encoder(embedder: Server) -> None:
    assert raw(embedder.url, "POST", "/v1/embeddings", {"model": "second", "input": TEXTS})[0] == 200
    found = json.loads(raw(embedder.url, "GET", "/status")[2])
    assert not found["completes"]
    assert {row["name"] for row in found["rows"]} == {"base", "first", "second"}
    metrics = raw(embedder.url, "GET", "/metrics")[2].decode()
    assert "bitloft_engine_rows_total" in metrics
    assert 'bitloft_adapter_requests_total{model="second"}' in metrics
    assert raw(embedder.url, "GET", "/health/ready")[0] == 200
