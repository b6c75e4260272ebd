"""tasks/precision.py: what was asked for, or what the processor can do, and why."""

import pytest
import torch

from bitloft.errors import OptionError
from bitloft.tasks import precision
from bitloft.tasks.precision import choose_precision, computes_bfloat16

CPU = torch.device("cpu")


def test_what_is_asked_for_is_taken() -> None:
    chosen = choose_precision("bfloat16", CPU)
    assert (chosen.dtype, chosen.name, chosen.why) == (torch.bfloat16, "bfloat16", "asked for")
    with chosen.autocast(CPU):
        assert torch.is_autocast_enabled("cpu")
    with choose_precision("float32", CPU).autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("able", "dtype", "why"), [(True, "bfloat16", "multiplies in"), (False, "float32", "has no")])
def test_auto_follows_the_processor(able: bool, dtype: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: able)
    chosen = choose_precision("auto", CPU)
    assert chosen.name == dtype
    assert chosen.why.startswith(f"this CPU {why}")


def test_capability_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins the two private probes of torch that this rests on."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert computes_bfloat16(CPU) is able


def test_unknown_word_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown dtype 'half'; use auto, float32 or bfloat16"):
        choose_precision("half", CPU)
