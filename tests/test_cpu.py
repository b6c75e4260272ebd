"""The native library as Python sees it: what it accepts, what it refuses in one sentence, how it is chosen."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.cpu import explain
from bitloft.kernels.ops import encode
from tests.test_formats import FORMATS

native = pytest.mark.skipif(cpu.library() is None, reason="no native library was built")


@native
@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (127, 576), (3, 130), (2, 0)])
def test_every_format_is_described_as_it_is_laid_out(spelling: str, shape: tuple[int, int]) -> None:
    packed = encode(torch.randn(shape), spelling)
    cpu.check(packed)
    if packed.codes.numel():
        with pytest.raises(KernelError, match="bytes of codes"):
            cpu.check(replace(packed, codes=packed.codes[:, :-1].contiguous()))
    if packed.scales.numel() > 1 and packed.shifts is None:
        with pytest.raises(KernelError, match="bytes of them"):
            cpu.check(replace(packed, scales=packed.scales.flatten()[:-1].unsqueeze(0)))
    if packed.codes.shape[0] > 1 and packed.codes.shape[1] > 1:
        with pytest.raises(KernelError, match=r"part 'codes' .* is not contiguous"):
            cpu.check(replace(packed, codes=packed.codes.T.contiguous().T))


def asked(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh process, where the library is chosen anew."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@native
def test_the_instruction_set_can_be_forced_and_a_wrong_one_is_refused() -> None:
    say = "from bitloft.kernels.cpu import explain; print(explain())"
    assert asked(say, BITLOFT_ISA="portable").stdout.startswith("native portable on ")
    assert asked(say, BITLOFT_ISA="plain").stdout == "plain torch definition (BITLOFT_ISA=plain)\n"
    refused = asked(say, BITLOFT_ISA="mmx").stderr
    assert "BITLOFT_ISA is 'mmx', which this build does not know; use avx512, avx2, portable or plain." in refused


def test_without_a_library_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_native.so")
    for cached in (cpu.library, cpu._load):
        monkeypatch.setattr(cpu, cached.__name__, cached.__wrapped__)
    assert cpu.library() is None
    assert explain() == "plain torch definition (no native library: the package was built without a C++ compiler)"
    (tmp_path / "_native.so").write_bytes(b"not a library")
    assert explain().startswith("plain torch definition (the native library cannot be loaded: ")
