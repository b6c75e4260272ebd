"""The model card states the figures of its report."""

from pathlib import Path

from bitloft.quantize import quantize


def test_the_card_holds_bits_and_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "b", format="lm2:64", rank=4)
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"{report.true_bits:.3f}" in card
    assert report.fingerprint in card
    assert "rank 4" in card
    assert card.startswith("---\n")
