"""What tests share: tiny models made in the process, shared data where it is present, and how close is close."""

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Text to train the tiny tokenizer on: any words do.
WORDS = (
    "the quick brown fox jumps over the lazy dog . a base is frozen and packed ; an adapter is trained on it and "
    "packed in turn . what is the capital of france ? paris is . one two three four five six seven eight nine ten"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shared(relative: str) -> Path:
    """A path below the shared data folder; skips the test with a reason where it is absent."""
    root = Path(os.environ.get("BITLOFT_SHARED", Path(__file__).parents[2] / "shared"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the shared data (set BITLOFT_SHARED)")
    return path


def tiny_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300-odd entries with a chat template, saved to ``directory``."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def tiny_llama(directory: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, tied: bool = True) -> Path:
    """A random Llama with its tokenizer, saved as a transformers folder; 14 linear modules, widths 64, 32 and 96."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    """A JSON lines file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make_adapter(
    directory: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: int = 8,
    scale: float = 0.2,
    base: Path | None = None,
) -> Path:
    """A random PEFT adapter for every linear of ``tiny_llama``, written as PEFT writes it (no peft needed).

    With ``base``, a packed base, it names that one by fingerprint, as `bitloft train` would.
    """
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    widths = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
              "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
              "mlp.down_proj": (64, 96)}  # fmt: skip
    tensors = {}
    for layer in range(2):
        for name, (rows, columns) in widths.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            decay = torch.logspace(0, -1, rank)  # trained adapters have steep spectra
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * decay[:, None]
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * scale / rank
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none",
        "base_model_name_or_path": "tiny", "target_modules": sorted(n.rsplit(".", 1)[1] for n in widths),
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "lora_dropout": 0.0,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if base is not None:
        from bitloft.integrations.record import base_record

        found = base_record(base)
        write_record(directory, found.fingerprint, found.source)
    return directory


def write_record(adapter: Path, base: str | None, source: str | None, start: str = "frozen") -> None:
    """bitloft_adapter.json with these fingerprints."""
    record = {"schema": 1, "base": base, "source": source, "start": start}
    (adapter / "bitloft_adapter.json").write_text(json.dumps(record), encoding="utf-8")


# of an output, of the sizes of its terms together, and of the largest input times the largest value: all kernels sum in
# float32; bfloat16 rounds the values too, level and shift apart; float32 inputs may become whole numbers that share an
# exponent
PRODUCTS = {
    torch.float32: (2e-5, 2e-5, 2e-6), torch.bfloat16: (2**-8, 2**-8, 2**-8), torch.float16: (2**-10, 2e-5, 2e-6),
}  # fmt: skip


def assert_product(x: torch.Tensor, y: torch.Tensor, dense: torch.Tensor) -> None:
    """That ``y`` is ``x @ dense.T`` [..., rows], each output as near as its own terms allow: they may cancel."""
    expected = x.double() @ dense.double().T
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    if not x.numel() or not dense.numel():
        assert not y.any()
        return
    of_output, of_terms, of_largest = PRODUCTS[x.dtype]
    bound = of_output * expected.abs() + of_terms * (x.double().abs() @ dense.double().abs().T)
    bound += of_largest * float(x.abs().max()) * float(dense.abs().max()) + torch.finfo(x.dtype).smallest_normal
    assert float(((y.double() - expected).abs() / bound).max()) <= 1
