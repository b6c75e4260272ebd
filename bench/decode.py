"""Tokens per second of one stream: packed at 2 and 4 bits against dense bfloat16, bitsandbytes and llama.cpp.

    1b        a random Llama of 22 layers, 2048 / 5632, 32 / 4 heads, vocabulary 32,000, untied; the output head in
              the format of the layers in every engine, and for bitloft a start of rank 16 at 4 bits on every matrix
    smollm2   SmolLM2-135M (--smollm2 or BITLOFT_SMOLLM2), its tied 16-bit table as it is

Every engine reads a short prompt, then decodes greedily one token at a time; engines take turns, and a ratio is the
median over the turns. bitloft's own decoder (``integrations.decoder``, float32 activations) is measured beside the same
packed model through transformers. ``python_ms_per_step`` is a step of a model of as many layers and next to no width:
what a step costs before anything is multiplied. An engine's floor is its bytes over the read bandwidth measured here.

llama.cpp runs in the Python named by --llama-python (BITLOFT_LLAMA_PYTHON), an environment with llama-cpp-python;
without one it is left out and its ratio is null. Its files are kept in --place (about 3.5 GB) for the next run.
The last line of stdout is one JSON object; lm2_vs_llamacpp_q2k_tokens is to reach 1.0, lm2_vs_dense_bf16 4.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from harness.llama import LlamaCpp, write_gguf
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitloft.formats import Format
from bitloft.integrations.decoder import Decoder
from bitloft.integrations.loading import quiet_loading
from bitloft.kernels.ops import encode
from bitloft.modules.linear import QuantLinear, replace_module
from bitloft.roofline import read_bandwidth
from bitloft.solvers.base import Solution, Start

SHAPES = {
    "1b": {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32_000},
    "thin": {"num_hidden_layers": 22, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64},
    "toy": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 256},
}  # fmt: skip
MODES = {"full": (48, 9), "quick": (24, 5), "smoke": (4, 1)}  # tokens a turn, turns
PROMPT, CONTEXT, RANK = 16, 256, 16
FORMATS = {"lm2": "lm2:64", "lm4": "lm4:64"}
TURN = 0.3  # seconds of one engine's turn, about
START = Format.parse("lm4:64")
GOALS = {"lm2_vs_llamacpp_q2k_tokens": 1.0, "lm2_vs_dense_bf16": 4.0}


@dataclass(frozen=True)
class Engine:
    """``seconds(prompt, tokens)`` of single-token steps; ``nbytes`` of weights are read (llama.cpp: its file)."""

    nbytes: int
    seconds: Callable[[int, int], float]


def main() -> int:
    given = arguments()
    harness.begin(given)
    tokens, turns = MODES[given.mode]
    models = {"toy": toy} if given.mode == "smoke" else {"1b": one_b, "smollm2": smollm2}
    bandwidth = read_bandwidth()
    found: dict[str, dict[str, dict[str, float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for name, make in models.items():
        engines = make(given)
        if engines:
            found[name], ratios[name] = measure(engines, tokens, turns, bandwidth)
            print(f"\n{name}: one stream after a prompt of {PROMPT} tokens")
            harness.table(
                ("engine", *next(iter(found[name].values()))), [(e, *r.values()) for e, r in found[name].items()]
            )
    main_ratios = ratios[next(iter(models))]
    python = {way: 1e3 * run(PROMPT, tokens) / tokens for way, run in thin().items()}
    result = {
        "lm2_vs_llamacpp_q2k_tokens": main_ratios.get("llama.cpp Q2_K"),
        "lm2_vs_dense_bf16": main_ratios["dense bf16"],
        "python_ms_per_step": round(python["bitloft"], 4),
        "python_ms_per_step_transformers": round(python["transformers"], 4),
        "lm2_times_the_tokens_of": ratios,
        "engines": found,
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "goals": GOALS,
    }
    shape = {
        "models": {name: SHAPES.get(name, name) for name in found},
        "prompt": PROMPT,
        "tokens": tokens,
        "turns": turns,
    }
    harness.finish("decode", given, shape, result)
    missed = [key for key, goal in GOALS.items() if (result[key] or 0.0) < goal]  # type: ignore[operator]
    return 1 if missed and given.mode != "smoke" else 0


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--smollm2", type=Path, default=os.environ.get("BITLOFT_SMOLLM2"))
    parser.add_argument("--llama-python", default=os.environ.get("BITLOFT_LLAMA_PYTHON"))
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()) / "bitloft-decode")
    return parser.parse_args()


def measure(
    engines: Mapping[str, Engine], tokens: int, turns: int, bandwidth: float
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Figures of every engine, and how many times its tokens lm2 makes, from turns taken one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    counts = {name: _tokens(engine, tokens) for name, engine in engines.items()}
    for _ in range(turns):
        for name, engine in engines.items():
            seconds[name].append(engine.seconds(PROMPT, counts[name]) / counts[name])
    figures = {}
    for name, engine in engines.items():
        step, floor = statistics.median(seconds[name]), engine.nbytes / bandwidth
        figures[name] = {
            "tokens_per_second": round(1 / step, 2), "ms_per_token": round(1e3 * step, 3),
            "floor_ms": round(1e3 * floor, 3), "of_floor": round(floor / step, 3),
        }  # fmt: skip
    ours = seconds["lm2"]
    ratios = {
        name: round(statistics.median(other / mine for other, mine in zip(seconds[name], ours, strict=True)), 3)
        for name in engines
    }
    return figures, ratios


def _tokens(engine: Engine, most: int) -> int:
    """Tokens of one turn: fewer where they would take longer than TURN; two at least."""
    engine.seconds(PROMPT, 1)  # warms up
    return max(2, min(most, int(TURN / engine.seconds(PROMPT, 1))))


# ---- models ----------------------------------------------------------------------------------------------------------


def one_b(given: argparse.Namespace) -> dict[str, Engine]:
    return random_engines("1b", given.place, given.llama_python)


def toy(given: argparse.Namespace) -> dict[str, Engine]:
    return random_engines("toy", given.place, None)


def random_engines(name: str, place: Path, llama_python: str | None) -> dict[str, Engine]:
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    weights = random_weights(config)
    engines = {}
    for kind, fmt in FORMATS.items():
        model = assemble(config, weights, packer(fmt))
        engines[kind] = Engine(bytes_of(model), ours(model))
        if kind == "lm2":
            engines["lm2 in transformers"] = Engine(bytes_of(model), transformers(model))
    dense = assemble(config, weights, dense_linear).to(torch.bfloat16)
    engines["dense bf16"] = Engine(bytes_of(dense), transformers(dense))
    nf4 = assemble(config, weights, bitsandbytes_linear).to(torch.bfloat16)
    engines["bitsandbytes nf4"] = Engine(bytes_of(nf4), transformers(nf4))
    if llama_python:
        place.mkdir(parents=True, exist_ok=True)
        source = place / f"{name}.gguf"
        if not source.exists():
            layer = {key: weight for key, weight in weights.items() if key not in ("table", "lm_head")}
            write_gguf(source, config, layer, weights["table"], weights["lm_head"])
        for kind in ("Q2_K", "Q4_0"):
            peer = LlamaCpp(llama_python, source, kind, CONTEXT)
            engines[f"llama.cpp {kind}"] = Engine(peer.nbytes, peer.seconds)
    return engines


def smollm2(given: argparse.Namespace) -> dict[str, Engine]:
    """SmolLM2 as quantized by the verb's settings; nothing where its folder is not given."""
    if not given.smollm2:
        return {}
    with quiet_loading():
        dense: Any = LlamaForCausalLM.from_pretrained(given.smollm2, dtype=torch.float32)
    engines = {}
    for kind, fmt in FORMATS.items():
        model = copy.deepcopy(dense).eval()
        pack = packer(fmt)
        for name, linear in linears(model.model):
            replace_module(model.model, name, pack(name, linear.weight.data))
        engines[kind] = Engine(bytes_of(model), ours(model))
    dense = dense.to(torch.bfloat16).eval()
    engines["dense bf16"] = Engine(bytes_of(dense), transformers(dense))
    return engines


def thin() -> dict[str, Callable[[int, int], float]]:
    """Both ways to decode a model of 22 layers with next to nothing to multiply."""
    config = LlamaConfig(**SHAPES["thin"], max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    model = assemble(config, random_weights(config), packer(FORMATS["lm2"]))
    ways = {"bitloft": ours(model), "transformers": transformers(model)}
    for run in ways.values():
        run(PROMPT, 4)
    return ways


def random_weights(config: LlamaConfig) -> dict[str, Tensor]:
    """Matrices of one layer (all layers hold copies), the table and the head."""
    generator = torch.Generator().manual_seed(0)
    width, inner, keys = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "lm_head": (config.vocab_size, width), "table": (config.vocab_size, width),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}


Make = Callable[[str, Tensor], nn.Module]


def assemble(config: LlamaConfig, weights: Mapping[str, Tensor], make: Make) -> Any:
    """A Llama whose linears ``make`` makes, once per name: every layer gets a copy with memory of its own."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    made = {name: make(name, weight) for name, weight in weights.items() if name != "table"}
    for name, _ in linears(model):
        replace_module(model, name, copy.deepcopy(made[name.partition("layers.")[2].partition(".")[2] or name]))
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(config.hidden_size))
    model.model.embed_tokens = nn.Embedding.from_pretrained(weights["table"].clone())
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def packer(fmt: str) -> Make:
    """Packed linears with a random start of rank 16."""

    def make(name: str, weight: Tensor) -> QuantLinear:
        rows, columns = weight.shape
        rank = min(RANK, rows, columns)
        layer = QuantLinear(columns, rows, Format.parse(fmt), rank=rank, scaling=1.0, start_format=START)
        a, bt = torch.randn(rank, columns) * columns**-0.5, torch.randn(rank, rows) * 0.1
        layer.load_solution(Solution(encode(weight, fmt), Start(encode(a, START), encode(bt, START), 1.0), 0.0, 0.0))
        return layer

    return make


def dense_linear(name: str, weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return layer


def bitsandbytes_linear(name: str, weight: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    layer: nn.Module = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def bytes_of(model: Any) -> int:
    """Bytes that a step reads: every stored tensor but an untied table, of which it reads a row."""
    tensors = {t.data_ptr(): t for _, t in [*model.named_parameters(), *model.named_buffers()]}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    table = 0 if tied else model.model.embed_tokens.weight.nbytes
    return sum(int(t.nbytes) for t in tensors.values()) - int(table)


# ---- ways to decode --------------------------------------------------------------------------------------------------


def ours(model: Any) -> Callable[[int, int], float]:
    decoder = Decoder(model)

    def run(prompt: int, tokens: int) -> float:
        rows, logits = decoder.prefill([list(range(1, prompt + 1))])
        began = time.perf_counter()
        for _ in range(tokens):
            logits = decoder.step(rows, logits.argmax(-1).tolist())
        return time.perf_counter() - began

    return run


def transformers(model: Any) -> Callable[[int, int], float]:
    @torch.no_grad()
    def run(prompt: int, tokens: int) -> float:
        out = model(input_ids=torch.arange(1, prompt + 1)[None], use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - began

    return run


if __name__ == "__main__":
    sys.exit(main())
