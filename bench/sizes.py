"""Stored size of four models at the LoftQ paper's settings, start included, beside the paper's ratios. No weights.

Modules come from transformers' own classes built on the meta device from the published configs, bytes from layout().
The paper (arXiv 2310.08659, Table 7) gives (backbone + adapters) / original. Its figures come out to a tenth of a per
cent if the backbone is the linears of the layers alone, the adapter has 16 bits a value and NF a 16-bit scale a group;
that is ``paper_like``. Embeddings are not in it, not even DeBERTa's, which the paper quantizes. What a user stores is

    payload   codes of the packed matrices and of their start, nothing else, over those matrices in 16 bit
    true      every stored byte of them, with the start in 4 bits as a base of ours has it
    file      the whole model, what is not packed (embeddings, norms, heads) in 16 bit

layout() is checked against a real file: a small random model is quantized, and the bytes of each packed tensor in the
file's header must be those of the layout.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from torch import nn

from bitloft.checkpoint import read_header, weight_files
from bitloft.formats import Format, layout

START = Format.parse("lm4:64")


class Setting(NamedTuple):
    """One row of the paper's Table 7, or ours at the same rank: ratio in per cent, None for ours."""

    format: str
    rank: int
    paper: float | None


DEBERTA = (Setting("uniform2:tensor", 16, 15.6), Setting("uniform2:tensor", 32, 18.8), Setting("nf2:64", 16, 17.2),
           Setting("nf2:64", 32, 20.4), Setting("lm2:64", 16, None), Setting("lm2:64+dq", 16, None))  # fmt: skip
BART = (Setting("nf2:64", 8, 15.3), Setting("nf2:64", 16, 16.7), Setting("nf4:64", 8, 27.8),
        Setting("nf4:64", 16, 29.0), Setting("uniform4:tensor", 8, 26.2), Setting("uniform4:tensor", 16, 27.5),
        Setting("lm2:64", 16, None))  # fmt: skip
LLAMA7 = (Setting("nf2:64", 64, 16.6), Setting("nf4:64", 64, 29.0), Setting("lm2:64", 64, None),
          Setting("lm2:64+dq", 64, None), Setting("lm4:64+dq", 64, None))  # fmt: skip
LLAMA13 = (Setting("nf2:64", 64, 16.0), Setting("nf4:64", 64, 28.5), Setting("lm2:64", 64, None),
           Setting("lm2:64+dq", 64, None), Setting("lm4:64+dq", 64, None))  # fmt: skip


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    harness.begin(arguments)
    names = ("deberta-v3-base",) if arguments.mode == "smoke" else tuple(MODELS)
    models = {name: measure(name) for name in names}
    for name, found in models.items():
        print(f"\n{name}: {found['parameters']:,} parameters, {found['packed_weights']:,} of them packed")
        columns = (
            "format",
            "rank",
            "paper %",
            "paper-like %",
            "true %",
            "payload %",
            "file %",
            "true bits",
            "with start",
        )
        rows = [[row[key] for key in ROW] for row in found["settings"]]
        harness.table(columns, rows)
    agreement = layout_against_file()
    print(f"\nlayout() against a real file: {agreement['tensors']} tensors, {agreement['differing']} differ")
    figures = {**models, "layout_agrees": agreement["differing"] == 0, "layout": agreement}
    harness.finish("sizes", arguments, {"models": list(names)}, figures)
    return 0 if agreement["differing"] == 0 else 1


ROW = ("format", "rank", "paper", "paper_like", "true", "payload", "file", "true_bits", "true_bits_with_start")


def measure(name: str) -> dict[str, Any]:
    """Ratios in per cent of 16 bit, for each setting."""
    with torch.device("meta"):
        model = MODELS[name][0]()
    shapes = list(matrices(model, embedding=name.startswith("deberta")))
    packed = sum(rows * columns for rows, columns, _ in shapes)
    total = sum(p.numel() for p in model.parameters())
    rows = [row(setting, shapes, packed, total) for setting in MODELS[name][1]]
    return {"parameters": total, "packed_weights": packed, "matrices": len(shapes), "settings": rows}


def row(setting: Setting, shapes: list[tuple[int, int, bool]], packed: int, total: int) -> dict[str, Any]:
    """One setting: the ratio that the paper's way of counting gives, the three of ours, true bits per packed weight."""
    fmt = Format.parse(setting.format)
    stored = sum(nbytes((rows, columns), fmt) for rows, columns, _ in shapes)
    start = adapter = backbone = counted = 0
    payload_start = 0.0
    for rows, columns, linear in shapes:
        if linear:
            backbone, counted = backbone + nbytes((rows, columns), fmt), counted + rows * columns
            start += nbytes((setting.rank, columns), START) + nbytes((setting.rank, rows), START)
            payload_start += setting.rank * (rows + columns) * START.bits / 8
            adapter += 2 * setting.rank * (rows + columns)
    rest = 2 * (total - packed)
    return {
        "format": setting.format,
        "rank": setting.rank,
        "paper": setting.paper,
        "paper_like": round(100 * (backbone + adapter) / (2 * counted), 2),
        "true": round(100 * (stored + start) / (2 * packed), 2),
        "payload": round(100 * (packed * fmt.bits / 8 + payload_start) / (2 * packed), 2),
        "file": round(100 * (stored + start + rest) / (2 * total), 2),
        "true_bits": round(8 * stored / packed, 4),
        "true_bits_with_start": round(8 * (stored + start) / packed, 4),
        "bytes": stored + start + rest,
    }


def nbytes(shape: tuple[int, int], fmt: Format) -> int:
    return sum(part.nbytes for part in layout(shape, fmt).values())


def matrices(model: nn.Module, embedding: bool) -> Iterator[tuple[int, int, bool]]:
    """[rows, columns] of every linear of attention and feed-forward, and whether it takes a start; DeBERTa's word
    embedding too, which the paper quantizes without an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(word in name for word in ("head", "pooler", "classifier")):
            yield module.out_features, module.in_features, True
        elif embedding and isinstance(module, nn.Embedding) and name.endswith("word_embeddings"):
            yield module.num_embeddings, module.embedding_dim, False


def deberta() -> Any:
    from transformers import DebertaV2Config, DebertaV2Model

    return DebertaV2Model(
        DebertaV2Config(
            vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            max_position_embeddings=512, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
            share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, type_vocab_size=0,
        )
    )  # fmt: skip


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(vocab_size=50265, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096,
                   decoder_ffn_dim=4096, encoder_attention_heads=16, decoder_attention_heads=16)
    )  # fmt: skip


def llama(hidden: int, middle: int, layers: int, heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
                    num_attention_heads=heads, tie_word_embeddings=False)
    )  # fmt: skip


MODELS = {
    "deberta-v3-base": (deberta, DEBERTA),
    "bart-large": (bart, BART),
    "llama-2-7b": (lambda: llama(4096, 11008, 32, 32), LLAMA7),
    "llama-2-13b": (lambda: llama(5120, 13824, 40, 40), LLAMA13),
}


def layout_against_file() -> dict[str, Any]:
    """Quantize a small random model; compare each packed part's bytes in the file with the layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from bitloft.quantize import quantize

    config = LlamaConfig(
        vocab_size=64, hidden_size=72, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4
    )
    tensors = differing = 0
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(Path(folder) / "model")
        for spelling in ("nf2:64", "lm3:64", "uniform2:tensor", "lm2:64+dq", "book2:64"):
            out = Path(folder) / spelling.replace(":", "-")
            report = quantize(Path(folder) / "model", out, format=spelling, rank=8)
            shapes = {m.name: m.shape for m in report.matrices}
            found = _stored(out)
            for name, shape in shapes.items():
                expected = nbytes((shape[0], shape[1]), Format.parse(spelling))
                start = nbytes((8, shape[1]), START) + nbytes((8, shape[0]), START)
                differing += found[name] != (expected, start)
                tensors += 1
    return {"tensors": tensors, "differing": differing}


def _stored(directory: Path) -> dict[str, tuple[int, int]]:
    """Bytes of the packed weight and of the start of each module, from the files' headers."""
    found: dict[str, tuple[int, int]] = {}
    for file in weight_files(directory):
        for key, entry in read_header(file).items():
            module, _, leaf = key.rpartition(".")
            if key == "__metadata__" or leaf == "bias":
                continue
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            weight, start = found.get(module, (0, 0))
            begins = leaf.startswith(("a0", "b0"))
            found[module] = (weight, start + size) if begins else (weight + size, start)
    return found


if __name__ == "__main__":
    sys.exit(main())
