"""Many packed adapters in little time: a few are packed, the others are copies of them with other codes.

A copy changes one byte of codes in ten and gets the sums that belong to it, so that it is as valid as any; scales and
widths stay. Packing thousands of adapters would take a day and change nothing that a server sees.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitloft.adapter_files import CONFIG_FILE, PACKED_FILE, seal
from bitloft.checkpoint import MANIFEST
from bitloft.compress import compress
from bitloft.integrations.record import base_record

RANK = 16
CHANGED = 0.1  # of the bytes of codes


def shapes_of(base: Path) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear of a Llama-shaped model, by module path."""
    config = AutoConfig.from_pretrained(base)
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    one = {"self_attn.q_proj": (width, queries), "self_attn.k_proj": (width, keys), "self_attn.v_proj": (width, keys),
           "self_attn.o_proj": (queries, width), "mlp.gate_proj": (width, inner), "mlp.up_proj": (width, inner),
           "mlp.down_proj": (inner, width)}  # fmt: skip
    return {f"model.layers.{i}.{name}": pair for i in range(config.num_hidden_layers) for name, pair in one.items()}


def write_plain(directory: Path, shapes: Mapping[str, tuple[int, int]], seed: int, base: Path | None) -> Path:
    """A random PEFT adapter with a steep spectrum; with ``base`` it names that one."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(RANK, *(min(pair) for pair in shapes.values()))
    tensors = {}
    for name, (columns, rows) in shapes.items():
        a = torch.randn(rank, columns, generator=generator) * torch.logspace(0, -1.2, rank)[:, None]
        tensors[f"base_model.model.{name}.lora_A.weight"] = a / columns**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.rsplit(".", 1)[1] for name in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (directory / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    if base is not None:
        found = base_record(base)
        record = {"schema": 1, "base": found.fingerprint, "source": found.source, "start": "frozen"}
        (directory / "bitloft_adapter.json").write_text(json.dumps(record), encoding="utf-8")
    return directory


def packed(place: Path, shapes: Mapping[str, tuple[int, int]], bits: float, base: Path | None) -> Path:
    """One adapter, packed; made where it does not exist."""
    plain, out = place / "plain", place / f"packed-{bits}"
    if not out.exists():
        if not plain.exists():
            write_plain(plain, shapes, 0, base)
        compress(plain, out, bits=bits, refine=False)
    return out


class Copies:
    """Copies of one packed adapter: the bytes of its files, changed for a seed."""

    def __init__(self, source: Path) -> None:
        self.raw = bytearray((source / PACKED_FILE).read_bytes())
        self.config = (source / CONFIG_FILE).read_bytes()
        manifest = json.loads((source / MANIFEST).read_bytes())
        self.record = {k: v for k, v in manifest.items() if k not in ("schema", "kind", "files", "self")}
        header = int.from_bytes(self.raw[:8], "little")
        begin, end = json.loads(self.raw[8 : 8 + header])["payload"]["data_offsets"]
        first = 8 + header + begin
        self.codes = (first + (end - begin) // 4, 8 + header + end)  # scales come first, and are less than a quarter

    def files(self, seed: int) -> dict[str, bytes]:
        """The three files of copy ``seed``."""
        raw, (begin, end) = bytearray(self.raw), self.codes
        chance = random.Random(seed)
        at = torch.randperm(end - begin, generator=torch.Generator().manual_seed(seed))[: int(CHANGED * (end - begin))]
        view = torch.frombuffer(raw, dtype=torch.uint8)
        view[begin + at] = torch.frombuffer(bytearray(chance.randbytes(len(at))), dtype=torch.uint8)
        return seal({CONFIG_FILE: self.config, PACKED_FILE: bytes(raw)}, self.record)

    def write(self, directory: Path, seed: int) -> Path:
        directory.mkdir(parents=True)
        for name, data in self.files(seed).items():
            (directory / name).write_bytes(data)
        return directory


def pool(place: Path, base: Path, count: int, bits: Sequence[float]) -> tuple[list[Path], int]:
    """``count`` adapters of the base, the widths in turn, and the bytes of their files."""
    sources = [Copies(packed(place, shapes_of(base), width, base)) for width in bits]
    root = place / "adapters"
    paths = [root / f"a{i:05d}" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            sources[i % len(sources)].write(path, i)
    return paths, sum(file.stat().st_size for path in paths for file in path.iterdir())


def toy(directory: Path) -> Path:
    """A random two-layer Llama with a tokenizer of a few hundred entries, for --smoke."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if directory.exists():
        return directory
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={"<end>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(directory)
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters) + 1, eos_token_id=0, **sizes)).save_pretrained(directory)
    return directory
