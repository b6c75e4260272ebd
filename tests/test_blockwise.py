"""A dense model block by block gives what the whole model gives, and holds one block."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from bitloft.integrations.blockwise import Blockwise, blocks_of
from bitloft.integrations.source import open_source
from tests.helpers import tiny_llama


def weights_in_memory(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_block_by_block(tmp_path: Path, tied: bool) -> None:
    folder = tiny_llama(tmp_path / "model", layers=3, tied=tied)
    teacher, ids = Blockwise.open(open_source(str(folder))), torch.arange(12).view(2, 6)
    most: list[int] = []
    for block in teacher.model.layers:
        block.mlp.register_forward_hook(lambda *_: most.append(weights_in_memory(teacher.model)))
    with torch.no_grad():
        found = [teacher.model(input_ids=ids)[0] for _ in range(2)]
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
        assert torch.equal(found[0], whole(input_ids=ids)[0])
    assert torch.equal(found[0], found[1])
    assert teacher.held == "one of 3 blocks"
    block_size = sum(p.numel() for p in whole.layers[0].parameters())
    outside = sum(p.numel() for p in whole.parameters()) - 3 * block_size
    assert set(most) == {outside + block_size}
    assert weights_in_memory(teacher.model) == outside


def test_an_encoder_block_by_block(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    whole = BertModel(config).eval()
    whole.save_pretrained(tmp_path)
    teacher = Blockwise.open(open_source(str(tmp_path)))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(teacher.model(input_ids=ids)[0], whole(input_ids=ids)[0])
    assert list(blocks_of(whole)) == ["encoder.layer.0", "encoder.layer.1"]


def test_a_model_that_names_no_blocks_is_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "model")
    monkeypatch.setattr("bitloft.integrations.blockwise.blocks_of", lambda model: {})
    teacher = Blockwise.open(open_source(str(folder)))
    assert teacher.held == "the whole model (its class names no blocks)"
    assert not any(p.is_meta for p in teacher.model.parameters())
