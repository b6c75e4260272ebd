"""Every Triton kernel compiles for a GPU, without one: Triton's compiler needs none. What they compute: test_gpu.py.

In a process of its own, because the interpreter of the other tests replaces the compiler when triton is imported.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPILE = """
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from bitloft.kernels import gpu_kernels

PARTS = {"codes": "*u8", "scales": "*i16", "exponent": "*i32", "zeros": "*u8", "shifts": "*i16", "levels": "*fp32",
         "low": "*i16", "step": "*i16"}
LISTS = {"table": "*i64", "lists": "*i32", "begin": "*i32", "places": "*i32", "scalings": "*fp32", "t": "*fp32"}
TYPES = PARTS | LISTS | {"x": "*bf16", "y": "*bf16", "out": "*bf16"}
BLOCK, TILE = {"BR": 16, "BC": 128}, {"BN": 32, "BO": 64, "BI": 32, "dtype": tl.bfloat16}
PLAIN = {"scaled": True, "one_range": False, "dq": False, "zero_bits": 0, "shifted": False}
FULL = {"scaled": True, "one_range": True, "dq": True, "zero_bits": 4, "shifted": True}

def compiled(name, **constants):
    kernel = getattr(gpu_kernels, name)
    signature = {p: "constexpr" if p in constants else TYPES.get(p, "i32") for p in kernel.arg_names}
    found = compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 80, 32))
    assert "ret;" in found.asm["ptx"]
    print(name)

for facts in ({"bits": 2, **PLAIN}, {"bits": 3, **FULL}, {"bits": 16, **PLAIN}):
    compiled("dequantize", **facts, **BLOCK)
    compiled("few", **facts, **BLOCK)
    compiled("many", **facts, **TILE, transposed=False)
    compiled("many", **facts, **TILE, transposed=True)
compiled("lora_down", **BLOCK)
compiled("lora_up", **BLOCK)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_compile_for_a_gpu() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split().count("many") == 6
