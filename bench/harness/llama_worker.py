"""llama.cpp in a process of its own, with the Python that has llama-cpp-python: quantizes a GGUF file, then decodes.

    python llama_worker.py SOURCE.gguf OUT.gguf Q2_K THREADS CONTEXT

Quantizes SOURCE to OUT unless OUT is there, all matrices in the one type (``pure``), loads it and prints "ready". For
each line "PROMPT TOKENS" on stdin it reads a prompt of that many tokens, then times that many greedy single-token steps
and prints the seconds. Imports nothing of bitloft: the two libraries need not share an environment.
"""

import ctypes
import os
import sys
import time

import llama_cpp as llama
import numpy as np


def main() -> None:
    source, out, kind, threads, context = sys.argv[1:]
    llama.llama_backend_init()
    if not os.path.exists(out):
        quantize(source, out, getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}"), int(threads))
    model = llama.llama_model_load_from_file(out.encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = int(context), int(threads), int(threads)
    runner = llama.llama_init_from_model(model, settings)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    print("ready", os.path.getsize(out), flush=True)
    for line in sys.stdin:
        prompt, tokens = map(int, line.split())
        llama.llama_memory_clear(llama.llama_get_memory(runner), True)
        token = decode(runner, list(range(1, prompt + 1)), vocabulary)
        began = time.perf_counter()
        for _ in range(tokens):
            token = decode(runner, [token], vocabulary)
        print(time.perf_counter() - began, flush=True)


def quantize(source: str, out: str, kind: int, threads: int) -> None:
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.pure = kind, threads, True
    if llama.llama_model_quantize(source.encode(), f"{out}.part".encode(), ctypes.byref(settings)):
        sys.exit(f"llama.cpp could not quantize {source}")
    os.rename(f"{out}.part", out)


def decode(runner: object, tokens: list[int], vocabulary: int) -> int:
    """The likeliest next token after ``tokens``."""
    array = (llama.llama_token * len(tokens))(*tokens)
    if llama.llama_decode(runner, llama.llama_batch_get_one(array, len(tokens))):
        sys.exit("llama.cpp could not decode")
    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(runner, -1), shape=(vocabulary,))
    return int(logits.argmax())


if __name__ == "__main__":
    main()
