"""The generate verb: base and adapters answer in one batch as each alone, by chat template or raw."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.generate import generate
from bitloft.integrations import decoder
from bitloft.integrations.loading import load
from bitloft.integrations.record import load_tokenizer
from bitloft.modules.multi import BASE
from bitloft.options import GenerateOptions
from bitloft.tasks.chat import encode_chat
from tests.serving import PACKED, PLAIN, World

PROMPTS = ["one two", "what is the capital of france ? paris is", "a base is frozen", "the lazy dog"]
SHORT = GenerateOptions(max_tokens=6)


@pytest.fixture
def adapters(world: World) -> dict[str, Path]:
    return {name: world.adapters / name for name in (*PACKED[:2], PLAIN)}


def test_mixed_answers_equal_single_ones(world: World, adapters: dict[str, Path]) -> None:
    names = ["alpha", None, PLAIN, "beta"]
    together = generate(world.base, PROMPTS, adapters, names, SHORT)
    for prompt, name, answer in zip(PROMPTS, names, together, strict=True):
        ids = encode_chat(world.service.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        assert answer == world.alone(ids, name or "base", 6)
    assert len(set(together)) == 4


def test_the_native_decoder_answers_as_transformers(
    world: World, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row ends before the others; and it is what answers, unless it has a reason not to."""
    options, names = GenerateOptions(max_tokens=40, raw=True), ["alpha", None, PLAIN, "beta"]
    model = load(world.base)
    if decoder.reason(model) is None:
        steps: list[int] = []
        step = decoder.Decoder.step

        def counted(run: Any, rows: Any, *rest: Any) -> Any:
            steps.append(len(rows))
            return step(run, rows, *rest)

        monkeypatch.setattr(decoder.Decoder, "step", counted)
        native = generate(world.base, PROMPTS, adapters, names, options)
        assert steps[0] == len(PROMPTS)
        monkeypatch.setattr(decoder, "reason", lambda model: "none of its business")
        assert native == generate(world.base, PROMPTS, adapters, names, options)


def test_raw_continues_the_prompt_itself(world: World, adapters: dict[str, Path]) -> None:
    answers = generate(world.base, PROMPTS[:1] * 2, adapters, ["beta", BASE], GenerateOptions(max_tokens=6, raw=True))
    ids = world.encode(PROMPTS[0])
    assert answers == [world.alone(ids, "beta", 6), world.alone(ids, "base", 6)]


def test_without_names(world: World, adapters: dict[str, Path]) -> None:
    only = {"alpha": adapters["alpha"]}
    assert generate(world.base, PROMPTS[:1], only, options=SHORT) == generate(
        world.base, PROMPTS[:1], adapters, ["alpha"], SHORT
    )
    assert generate(world.base, PROMPTS[:1], options=SHORT) == generate(
        world.base, PROMPTS[:1], adapters, [BASE], SHORT
    )
    with pytest.raises(OptionError, match="3 adapters are given; say by names which of them answers which prompt"):
        generate(world.base, PROMPTS, adapters)


def test_sampling_follows_the_seed(world: World) -> None:
    def ask(seed: int, temperature: float = 1.5) -> list[str]:
        options = GenerateOptions(max_tokens=8, temperature=temperature, top_p=0.95, seed=seed)
        return generate(world.base, PROMPTS[:2], options=options)

    state = torch.random.get_rng_state()
    assert ask(1) == ask(1) != ask(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ask(1, temperature=0.0) == ask(2, temperature=0.0)


def test_as_the_python_api_spells_it(world: World, adapters: dict[str, Path]) -> None:
    """``load(..., adapters=...)`` with ``adapter_names=`` gives the verb's answers."""
    model: Any = load(world.base, adapters={name: adapters[name] for name in PACKED[:2]})
    tokenizer = load_tokenizer(world.base)
    tokenizer.padding_side = "left"
    inputs = tokenizer(PROMPTS[:3], return_tensors="pt", padding=True)
    names = ["alpha", BASE, "beta"]
    out = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        adapter_names=names,
        max_new_tokens=6,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    options = GenerateOptions(max_tokens=6, raw=True)
    assert texts == generate(world.base, PROMPTS[:3], adapters, names, options)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompts": []}, OptionError, "takes a list of prompts"),
    ({"prompts": "one"}, OptionError, "takes a list of prompts"),
    ({"prompts": ["one", ""]}, OptionError, "each of one character or more"),
    ({"names": ["alpha", "beta"]}, OptionError, "2 names are given for 1 prompts"),
    ({"names": ["nobody"]}, OptionError, "no adapter 'nobody' is given; known: alpha, beta, delta"),
    ({"prompts": ["the " * 300]}, OptionError, "this model's context is 256"),
    ({"options": GenerateOptions(max_tokens=255)}, OptionError, "max_tokens is 255; this model's context is 256"),
]


@pytest.mark.parametrize(("fields", "kind", "words"), BAD, ids=lambda value: str(value)[:30])
def test_refusals(world: World, adapters: dict[str, Path], fields: Any, kind: Any, words: str) -> None:
    given: Any = {"prompts": ["one"], "adapters": adapters, "names": ["alpha"], "options": SHORT} | fields
    with pytest.raises(kind, match=words):
        generate(world.base, **given)


def test_directories_that_cannot_be_used(world: World, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="trained for another base"):
        generate(world.base, ["one"], {"foreign": world.adapters / "foreign"})
    with pytest.raises(CheckpointError, match="is not a directory"):
        generate(world.base, ["one"], {"none": tmp_path / "none"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; use a positive number"),
        ({"temperature": -1.0}, "temperature is -1.0; use 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; use a positive number"),
        ({"top_p": 1.1}, "top_p is 1.1; use a share"),
    ],
)
def test_options(fields: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        GenerateOptions(**fields)
