"""An adapter on a base that it does not name: told apart, refused, measured or allowed, never passed in silence."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from bitloft.adapters import read_adapter, read_packed
from bitloft.compress import compress
from bitloft.errors import AdapterError, OptionError
from bitloft.generate import generate
from bitloft.integrations.loading import load
from bitloft.integrations.mismatch import Gate, Mismatch, decide, mismatch_of
from bitloft.integrations.record import base_record
from bitloft.modules.multi import AdapterBank
from bitloft.options import GenerateOptions, ServeOptions
from bitloft.quantize import quantize
from bitloft.serve.api import app
from bitloft.serve.http import open_service
from bitloft.serve.service import Service
from tests.helpers import make_adapter, write_record

OTHER = "f" * 64


@pytest.fixture(scope="module")
def bases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two bases of one model, by bits."""
    root = tmp_path_factory.mktemp("bases")
    for bits in (2, 4):
        quantize(tiny_model, root / f"b{bits}", format=f"lm{bits}:64", rank=0, solver="qlora")
    return {bits: root / f"b{bits}" for bits in (2, 4)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Without any fingerprint, named as PEFT names the model it was trained on."""
    return make_adapter(tmp_path / "adapter", scale=1.0)


def named(adapter: Path, name: object) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return adapter


def found(adapter: Path, base: Path) -> Mismatch:
    mismatch = mismatch_of(read_adapter(adapter), base_record(base))
    assert mismatch is not None
    return mismatch


def test_the_base_that_it_names_is_no_mismatch(adapter: Path, bases: dict[int, Path]) -> None:
    write_record(adapter, base_record(bases[2]).fingerprint, None)
    assert mismatch_of(read_adapter(adapter), base_record(bases[2])) is None


def test_kinds_are_told_apart(adapter: Path, bases: dict[int, Path]) -> None:
    source = base_record(bases[4]).source
    cases: list[tuple[str | None, str | None, str, str, bool]] = [
        (OTHER, source, "frozen", r"^trained for another base \(fingerprint ffffffffffff\) of the same model$", True),
        (OTHER, "e" * 64, "frozen", "another base .* of another model", False),
        (OTHER, None, "frozen", "another base .* of a model that is not recorded", False),
        (None, source, "frozen", "trained for the same model in 16 bit, not for a quantized base", True),
        (None, "e" * 64, "frozen", "trained for another model in 16 bit", False),
        (OTHER, source, "foreign", "made as the start of a base that another tool quantized", False),
    ]
    for base, model, start, words, same in cases:
        write_record(adapter, base, model, start)
        mismatch = found(adapter, bases[4])
        assert mismatch.same_model is same
        with pytest.raises(AdapterError, match=words):
            raise AdapterError(mismatch.clause)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("MODEL", True),
        ("org/MODEL", True),
        ("/home/somebody/models/MODEL/", True),
        ("unsloth/MODEL-bnb-4bit", True),
        ("org/MODEL-2", False),
        ("elsewhere/b4", False),
        ("\0/../" * 1000 + "x", False),
        ("", False),
        (None, False),
        (7, False),
    ],
)
def test_without_fingerprints_the_name_speaks(
    adapter: Path, bases: dict[int, Path], tiny_model: Path, name: object, same: bool
) -> None:
    model = tiny_model.resolve().name
    mismatch = found(named(adapter, name.replace("MODEL", model) if isinstance(name, str) else name), bases[4])
    assert mismatch.same_model is same
    assert "without a fingerprint" in mismatch.clause
    assert len(mismatch.clause) < 200
    assert "somebody" not in mismatch.clause  # whose folders these were is nobody's business


def test_what_peft_trained_on_the_loaded_base_names_its_folder(adapter: Path, bases: dict[int, Path]) -> None:
    mismatch = found(named(adapter, str(bases[4])), bases[4])
    assert mismatch.same_model
    assert "for this folder ('b4') by name" in mismatch.clause


def test_the_default_goes_by_bits_and_model(adapter: Path, bases: dict[int, Path]) -> None:
    two, four = base_record(bases[2]), base_record(bases[4])
    assert (two.bits, four.bits) == (2, 4)
    same, other = Mismatch("trained for another base", True), Mismatch("trained for another base", False)
    assert decide(same, four, None, "a") == "measure"
    for mismatch, record in ((same, two), (other, two), (other, four)):
        with pytest.raises(AdapterError, match=r"adapter a was trained for another base; .*`bitloft rebase`"):
            decide(mismatch, record, None, "a")
        assert decide(mismatch, record, "measure", "a") == "measure"
        assert decide(mismatch, record, "allow", "a") == "allow"
    with pytest.raises(AdapterError, match=r"is [0-9a-f]{12}\."):
        decide(same, four, "refuse", "a")


def test_one_narrow_matrix_makes_a_narrow_base(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "mixed", format="lm4:64", rank=0, solver="qlora", rules=("layers.1.*=lm2:64",))
    assert base_record(tmp_path / "mixed").bits == 2


@pytest.mark.parametrize("options", [GenerateOptions, ServeOptions])
def test_another_word_is_refused(options: Any) -> None:
    with pytest.raises(OptionError, match="unknown base_mismatch 'maybe'; use one of refuse, measure, allow"):
        options(base_mismatch="maybe")
    with pytest.raises(OptionError, match="unknown base_mismatch 'maybe'"):
        load("nowhere", base_mismatch="maybe")


def test_load_logs_what_it_lets_through(
    adapter: Path, bases: dict[int, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compress(adapter, tmp_path / "packed", bits=4.0)
    for base in bases.values():
        with pytest.raises(AdapterError, match="was made without a fingerprint, for 'tiny' by name"):
            load(base, adapters={"mine": tmp_path / "packed"})
    with caplog.at_level(logging.WARNING, "bitloft"):
        model = load(bases[2], adapters={"mine": tmp_path / "packed"}, base_mismatch="measure")
    assert "adapter mine was made without a fingerprint" in caplog.text
    change = (
        r"changes the loss by [+-]\d\.\d{4} nats a token \(\d+\.\d{4} to \d+\.\d{4}\) on \d+ tokens of the built-in"
    )
    assert [record.name for record in caplog.records if record.name.startswith("bitloft")] == ["bitloft"]
    assert re.search(change, caplog.text)
    assert model.bitloft_bank.names == ("mine",)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bitloft"):
        load(bases[2], adapters={"mine": tmp_path / "packed"}, base_mismatch="allow")
    assert "allowed here without a measurement" in caplog.text


def test_generate_asks_too(adapter: Path, bases: dict[int, Path], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AdapterError, match="without a fingerprint"):
        generate(bases[4], ["one"], {"mine": adapter})
    options = GenerateOptions(max_tokens=2, base_mismatch="allow")
    with caplog.at_level(logging.WARNING, "bitloft"):
        assert len(generate(bases[4], ["one"], {"mine": adapter}, options=options)) == 1
    assert "allowed here" in caplog.text


def test_the_measured_change_is_the_model_s_own_loss(adapter: Path, bases: dict[int, Path]) -> None:
    model = load(bases[4])
    bank = AdapterBank(model)
    said = Gate(bank, base_record(bases[4]), "measure").attach("mine", read_adapter(adapter), "mine")
    assert said is not None
    from bitloft.integrations.mismatch import built_in

    sequences = built_in(bases[4], model.config)
    assert not isinstance(sequences, str)
    (ids, labels) = sequences[0]
    with torch.no_grad(), bank.rows(["mine"]):
        logits = model(ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), labels[1:])
    assert f"to {float(loss):.4f})" in said


def test_an_adapter_whose_loss_is_not_finite_is_refused_and_detached(adapter: Path, bases: dict[int, Path]) -> None:
    tensors = {k: t * 1e18 for k, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    bank = AdapterBank(load(bases[4]))
    with pytest.raises(AdapterError, match="its loss on this base is nan"):
        Gate(bank, base_record(bases[4]), "measure").attach("mine", read_adapter(adapter), "mine")
    assert bank.names == ()


def test_without_a_tokenizer_it_says_that_nothing_was_measured(
    adapter: Path, bases: dict[int, Path], tmp_path: Path
) -> None:
    bare = shutil.copytree(bases[4], tmp_path / "bare")
    for file in (*bare.glob("*token*"), bare / "manifest.json"):
        file.unlink()
    gate = Gate(AdapterBank(load(bare)), base_record(bare), "measure")
    said = gate.attach("mine", read_adapter(adapter), "mine")
    assert said is not None
    assert said.endswith("not measured here: the base holds no tokenizer.")


def cards(service: Service) -> dict[str, Any]:
    """/v1/models by name, as a client reads it."""
    answer = TestClient(app(service), base_url="http://localhost").get("/v1/models")
    return {card["id"]: card for card in answer.json()["data"]}


def test_a_server_measures_while_it_loads_and_shows_it(adapter: Path, bases: dict[int, Path], tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(adapter, served / "plain")
    shutil.copytree(adapter, served / "same")
    write_record(served / "same", OTHER, base_record(bases[4]).source)
    said: list[str] = []
    service = open_service(bases[4], served, ServeOptions(port=0), said.append)
    assert service.store.names == ("same",)  # measured by default: the model is the same, the base has 4 bits
    assert any("adapter plain is not served: adapter plain was made without a fingerprint" in line for line in said)
    assert any("adapter same:" in line and "changes the loss by" in line for line in said)
    card = cards(service)["same"]
    assert "of the same model; on this base (4 bit) it changes the loss" in card["base_mismatch"]
    assert str(tmp_path) not in json.dumps(card)
    assert "base_mismatch" not in cards(service)[service.store.base_name]
    assert open_service(bases[2], served, ServeOptions(port=0), said.append).store.names == ()
    allowed = open_service(bases[2], served, ServeOptions(port=0, base_mismatch="allow"), said.append)
    assert allowed.store.names == ("plain", "same")
    assert "without a measurement" in str(allowed.store.find("plain").note)


def test_two_names_for_the_same_files_are_told_of_both(adapter: Path, bases: dict[int, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        compress(adapter, tmp_path / "served" / name, bits=4.0)
    options = ServeOptions(port=0, base_mismatch="measure")
    store = open_service(bases[2], tmp_path / "served", options, lambda line: None).store
    assert store.find("one").note == store.find("two").note
    assert "changes the loss" in str(store.find("one").note)
    assert read_packed(tmp_path / "served" / "one").mismatch is None  # packed without a base: nothing to tell there
