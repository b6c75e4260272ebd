"""A tiny random model of every architecture that the tests know: one or two layers, widths of 16 to 128."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

_NAMES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
          "num_attention_heads": 4}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_NAMES, **_SPECIAL, "num_key_value_heads": 2}
_ENCODER_DECODER = {"vocab_size": 96, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128,
                    "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                    "decoder_start_token_id": 1, **_SPECIAL}  # fmt: skip
_DEBERTA = {**_NAMES, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}  # fmt: skip
_MOE = {**_GROUPED, "head_dim": 16, "num_experts_per_tok": 2}

# name -> class, settings of its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "phi": ("PhiForCausalLM", {**_NAMES, **_SPECIAL}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_NAMES, **_SPECIAL}),
    "bert": ("BertForMaskedLM", _NAMES),
    "bert_classifier": ("BertForSequenceClassification", _NAMES),
    "roberta": ("RobertaForSequenceClassification", _NAMES),
    "deberta_v3": ("DebertaV2ForSequenceClassification", _DEBERTA),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4},
    ),
    "albert": ("AlbertForMaskedLM", {**_NAMES, "num_hidden_layers": 3, "embedding_size": 32}),
    "bart": ("BartForConditionalGeneration", {**_ENCODER_DECODER, "scale_embedding": True}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4,
         "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_ENCODER_DECODER, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20,
         "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_MOE, "num_experts": 4, "moe_intermediate_size": 64}),
    "gpt_oss": ("GptOssForCausalLM", {**_MOE, "num_local_experts": 4}),
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")


def make(name: str, **settings: Any) -> PreTrainedModel:
    """A random model, in eval mode; the same for the same name."""
    class_name, given = MODELS[name]
    kind: Callable[..., PreTrainedModel] = getattr(hf, class_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**given, **settings})).eval()  # type: ignore[attr-defined]
    for parameter in model.parameters():  # what starts as zeros or ones would hide a mistake
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """A batch of two for a model's forward."""
    ids = torch.arange(3, 19).view(2, 8)
    if name == "whisper":
        return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids} if name in ("bart", "t5") else {"input_ids": ids}
