"""llama.cpp as a peer: a random Llama written as GGUF, and the worker process that quantizes and decodes it."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORKER = Path(__file__).with_name("llama_worker.py")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(file: Path, config: Any, layer: Mapping[str, Tensor], table: Tensor, head: Tensor) -> None:
    """A Llama of ``config`` whose layers all hold the matrices of ``layer``; matrices in fp16, no tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    ones = torch.ones(config.hidden_size).numpy()
    matrices = {NAMES[name]: weight.half().numpy() for name, weight in layer.items()}
    writer.add_tensor("token_embd.weight", table.half().numpy())
    for i in range(config.num_hidden_layers):
        for name, weight in matrices.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", weight)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", head.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in one of llama.cpp's types, decoding when asked."""

    def __init__(self, python: str, source: Path, kind: str, context: int) -> None:
        out = source.with_name(f"{source.stem}-{kind}.gguf")
        command = [python, str(WORKER), str(source), str(out), kind, str(torch.get_num_threads()), str(context)]
        worker: Any = subprocess.Popen(
            command,
            text=True,
            env=os.environ | {"PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._worker = worker
        ready = worker.stdout.readline().split()
        if ready[:1] != ["ready"]:
            raise RuntimeError(f"{python} could not run llama.cpp on {source.name} in {kind}")
        self.nbytes = int(ready[1])

    def seconds(self, prompt: int, tokens: int) -> float:
        """Seconds of ``tokens`` steps after a prompt of ``prompt`` tokens."""
        self._worker.stdin.write(f"{prompt} {tokens}\n")
        self._worker.stdin.flush()
        return float(self._worker.stdout.readline())

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait()
