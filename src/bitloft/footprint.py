"""Bytes before they exist: what a base, its adapters and a serving process take, from the model's config alone.

    config -> the model class on the meta device -> the quantize verb's own plan -> slots, the files to the last byte

A model without weights becomes a checkpoint of headers (sparse files of the right length, removed again), so that every
rule about names, ties and choice of modules is the verb's and none is repeated here. A table of sizes by architecture,
the alternative, would be wrong at the first model that is not in it.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig

from bitloft.adapters import PREFIX
from bitloft.errors import CheckpointError
from bitloft.integrations.loading import model_class, quiet_loading
from bitloft.integrations.skeleton import specs_of
from bitloft.integrations.source import Source, open_source
from bitloft.options import PlanOptions
from bitloft.shards import Spec
from bitloft.slots import lay_out
from bitloft.stream import make_plan

SHARD = 50_000_000_000  # as quantize writes by default
FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Shape:
    """One packed matrix [rows, columns] in ``format``, ``count`` of them."""

    rows: int
    columns: int
    format: str
    count: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class Footprint:
    """Bytes. ``base`` are the weight files; ``loaded`` the base in memory on a CPU, what is not packed in float32;
    ``cache`` the keys and values of one token; ``adapter_plain`` and ``adapter_packed`` the files of one adapter,
    ``adapter_training`` its values, gradients and AdamW's two moments."""

    name: str
    shapes: tuple[Shape, ...]
    layers: int
    head: int
    source: int
    base: int
    loaded: int
    start: int
    true_bits: float
    cache: int
    adapter_values: int
    adapter_plain: int
    adapter_packed: int
    adapter_training: int

    @property
    def weights(self) -> int:
        return sum(shape.weights for shape in self.shapes)


@contextmanager
def sketched(model: str) -> Iterator[Source]:
    """The source of a model folder, URL or hub name; where it has no weights, one of headers alone.

    Raises CheckpointError where there is no config that transformers knows.
    """
    folder = Path(model)
    if "://" in model or any(folder.glob("*.safetensors")):
        yield open_source(model)
        return
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model} has no config that can be read ({first}); give a folder or a hub name."
        ) from error
    with tempfile.TemporaryDirectory(prefix="bitloft-plan-") as place:
        yield _sketch(config, Path(place) / (folder.name if folder.is_dir() else model.rpartition("/")[2]))


def _sketch(config: PreTrainedConfig, folder: Path) -> Source:
    if not config.architectures:
        raise CheckpointError(f"the config of {folder.name} names no architecture; add one, as in LlamaForCausalLM.")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16
    with torch.device("meta"):
        model = model_class(config.to_dict(), folder.name)(config).to(dtype)
    tied = getattr(model, "all_tied_weights_keys", {})
    specs = {name: spec for name, spec in specs_of(model.state_dict()).items() if name not in tied}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    slots = lay_out(folder, specs, SHARD)
    for file, (header, size) in slots.files.items():
        (folder / file).write_bytes(header)
        with (folder / file).open("r+b") as stream:
            stream.truncate(size)  # sparse: takes no space
    if slots.index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(slots.index))
    return open_source(str(folder))


def footprint(source: Source, options: PlanOptions) -> Footprint:
    """Count everything. Raises what the quantize verb would raise for this model and these options."""
    plan = make_plan(source, options.quantizing())
    slots = lay_out(Path(), plan.outputs, SHARD)
    packed = {output for matrix in plan.matrices for output in matrix.outputs}
    starts = sum(plan.outputs[o].nbytes for m in plan.matrices for o in m.outputs if m.is_start(o))
    stored = sum(plan.outputs[output].nbytes for output in packed)
    counts: dict[tuple[int, int, str], int] = {}
    for matrix in plan.matrices:
        key = (*matrix.shape[-2:], matrix.format)
        counts[key] = counts.get(key, 0) + prod(matrix.shape[:-2])  # type: ignore[index, arg-type]
    shapes = tuple(Shape(rows, columns, fmt, n) for (rows, columns, fmt), n in counts.items())
    weights = sum(shape.weights for shape in shapes)
    linears = {m.name: m.shape for m in plan.matrices if len(m.shape) == 2}
    values = options.adapter_rank * sum(sum(shape) for shape in linears.values())
    config = plan.skeleton.model.config.get_text_config()
    head = plan.skeleton.model.get_output_embeddings() if plan.skeleton.known else None
    read = {name for reading in plan.skeleton.readings for name in reading.sources}
    return Footprint(
        name=source.name,
        shapes=shapes,
        layers=int(getattr(config, "num_hidden_layers", 0) or 0),
        head=0 if head is None else prod(head.weight.shape),
        source=sum(plan.skeleton.tensors[name].spec.nbytes for name in read),
        base=slots.nbytes,
        loaded=stored + sum(_in_float32(spec) for name, spec in plan.outputs.items() if name not in packed),
        start=starts,
        true_bits=8 * (stored - starts) / weights if weights else 0.0,
        cache=_cache(config),
        adapter_values=values,
        adapter_plain=_plain(linears, options.adapter_rank),
        adapter_packed=int(options.adapter_bits * values / 8),
        adapter_training=16 * values,
    )


def _in_float32(spec: Spec) -> int:
    return 4 * prod(spec.shape) if spec.dtype in FLOATS else spec.nbytes


def _cache(config: Any) -> int:
    """Keys and values of one token in float32; 0 for a model that keeps none."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not getattr(config, "num_hidden_layers", None):
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * 4 * int(config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width)


def _plain(linears: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """The bytes of PEFT's weight file, header included, as `bitloft train` writes it (float32)."""
    specs = {}
    for name, (rows, columns) in linears.items():
        specs[f"{PREFIX}{name}.lora_A.weight"] = Spec("F32", (rank, columns))
        specs[f"{PREFIX}{name}.lora_B.weight"] = Spec("F32", (rows, rank))
    return lay_out(Path(), specs, 1 << 62).nbytes if specs else 0


def random_llama(folder: Path, hidden: int, middle: int, layers: int, vocabulary: int) -> Path:
    """A Llama of random half-precision weights, to measure a machine with."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1), num_key_value_heads=max(hidden // 64, 1),
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with quiet_loading():
        transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def random_text(folder: Path, tokens: int) -> Path:
    """A text of so many random words beside a model that ``random_llama`` made, and a tokenizer that knows them."""
    size = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    words = {f"w{number}": number for number in range(size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", pad_token="w1").save_pretrained(folder)
    draw = random.Random(0)
    text = folder.with_name(f"{folder.name}.txt")
    text.write_text(" ".join(f"w{draw.randrange(size)}" for _ in range(tokens)) + "\n", encoding="utf-8")
    return text
