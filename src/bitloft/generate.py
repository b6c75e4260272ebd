"""The generate verb: prompts answered by the base and any adapters in one left-padded batch.

The likeliest tokens come from the native decoder where it takes the model (``integrations.decoder``); drawn ones, and
every other model, from transformers' ``generate``, which is what ``load`` gives a program.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitloft.errors import OptionError
from bitloft.integrations import decoder
from bitloft.integrations.loading import attach, load
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.modules.multi import BASE
from bitloft.options import GenerateOptions
from bitloft.tasks.chat import encode_chat


def generate(
    base: Path | str,
    prompts: Sequence[str],
    adapters: Mapping[str, Path | str] | None = None,
    names: Sequence[str | None] | None = None,
    options: GenerateOptions | None = None,
) -> list[str]:
    """The answers to ``prompts``, prompt i by the adapter ``names[i]``; None or "__base__" is the base alone.

    ``adapters`` are directories by name, plain or packed. Without ``names`` the only adapter answers everything, or
    the base where there is none. A prompt is one user message in the tokenizer's chat template, or the text itself
    where there is no template or with ``raw``.
    Raises OptionError for empty prompts, names that do not fit and prompts beyond the model's context, CheckpointError
    and AdapterError for directories that cannot be used.
    """
    options, adapters = options or GenerateOptions(), adapters or {}
    if isinstance(prompts, str) or not prompts or not all(prompts):
        raise OptionError("generate takes a list of prompts, each of one character or more.")
    owners = _owners(len(prompts), list(adapters), names)
    tokenizer, model = load_tokenizer(base), load(base, activations=options.activations)
    attach(model, adapters, base_record(base), options.base_mismatch)
    rows = [_encode(tokenizer, prompt, options.raw) for prompt in prompts]
    _check_context(model, rows, options.max_tokens)
    if options.temperature == 0 and decoder.reason(model) is None:
        found = _follow(model, rows, owners, options.max_tokens)
    else:
        found = _draw(model, tokenizer, rows, owners, options)
    texts: list[str] = tokenizer.batch_decode(found, skip_special_tokens=True)
    return texts


def _owners(count: int, known: list[str], names: Sequence[str | None] | None) -> list[str]:
    """One adapter name for each prompt."""
    if names is None:
        if len(known) > 1:
            raise OptionError(f"{len(known)} adapters are given; say by names which of them answers which prompt.")
        return (known or [BASE]) * count
    if len(names) != count:
        raise OptionError(f"{len(names)} names are given for {count} prompts; give one for each.")
    unknown = next((name for name in names if name not in (*known, None, BASE)), None)
    if unknown is not None:
        raise OptionError(f"no adapter {unknown!r} is given; known: {', '.join(known) or 'none'}.")
    return [name or BASE for name in names]


def _encode(tokenizer: Any, prompt: str, raw: bool) -> list[int]:
    if raw or not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def _check_context(model: Any, rows: list[list[int]], answer: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows))
    if limit is not None and longest + answer > limit:
        raise OptionError(
            f"the longest prompt has {longest} tokens and max_tokens is {answer}; this model's context is {limit}."
        )


@torch.no_grad()
def _follow(model: Any, rows: list[list[int]], owners: list[str], most: int) -> list[list[int]]:
    """The likeliest tokens of every row, up to an end token or ``most`` of them, by the native decoder."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    run = decoder.Decoder(model, model.bitloft_bank)
    states, logits = run.prefill(rows, owners)
    answers: list[list[int]] = [[] for _ in rows]
    running = list(range(len(rows)))
    while True:
        tokens = logits.argmax(-1).tolist()
        for i, token in zip(running, tokens, strict=True):
            answers[i].append(token)
        going = [n for n, token in enumerate(tokens) if token not in ends and len(answers[running[n]]) < most]
        running, tokens = [running[n] for n in going], [tokens[n] for n in going]
        if not running:
            return answers
        logits = run.step([states[i] for i in running], tokens, [owners[i] for i in running])


def _draw(
    model: Any, tokenizer: Any, rows: list[list[int]], owners: list[str], options: GenerateOptions
) -> list[list[int]]:
    """The tokens that transformers' generate gives, drawn or the likeliest."""
    longest = max(map(len, rows))
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        choice = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        out = model.generate(
            ids,
            attention_mask=mask,
            adapter_names=owners,
            max_new_tokens=options.max_tokens,
            pad_token_id=pad,
            **choice,
        )
    answers: list[list[int]] = out[:, longest:].tolist()
    return answers
