"""register: one call that makes transformers and PEFT know us, as often as anybody likes."""

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import bitloft


def test_registering_twice_changes_nothing() -> None:
    bitloft.register()
    first = AUTO_QUANTIZER_MAPPING["bitloft"]
    bitloft.register()
    assert AUTO_QUANTIZER_MAPPING["bitloft"] is first
