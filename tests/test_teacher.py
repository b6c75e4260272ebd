"""The teacher: the whole model's forward with one block in memory; its states are asked once, and for one text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from bitloft.calibrate import teacher as module
from bitloft.calibrate.blocks import stacks_of
from bitloft.calibrate.teacher import Teacher, TeacherStates
from bitloft.integrations.source import open_source
from tests.helpers import tiny_llama


def test_states_are_the_model_s_and_are_asked_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)
    ids = torch.randint(0, 300, (8, 10), generator=torch.Generator().manual_seed(0))
    source, told = open_source(str(tiny_model)), list[str]()
    states = TeacherStates.ask(source, ids, tmp_path, lambda done, total, what: told.append(f"{done}/{total} {what}"))
    assert told[-1] == "3/3 asking the teacher, one of 2 blocks in memory"
    got, hidden = states.batch([7, 0, 4])
    assert torch.equal(got, ids[[7, 0, 4]])
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        wanted = model.model(input_ids=got)[0]
    assert torch.allclose(hidden.float(), wanted, atol=0.1)
    assert float((hidden.float() - wanted).norm() / wanted.norm()) < 0.02
    monkeypatch.setattr(module.Teacher, "open", lambda source: pytest.fail("asked again"))
    again = TeacherStates.ask(source, ids, tmp_path)
    assert (again.held, again.files) == (states.held, states.files)


def test_states_of_other_sequences_are_other_files(tiny_model: Path, tmp_path: Path) -> None:
    source, ids = open_source(str(tiny_model)), torch.ones(2, 4, dtype=torch.long)
    first = TeacherStates.ask(source, ids, tmp_path)
    second = TeacherStates.ask(source, 2 * ids, tmp_path)
    assert not set(first.files) & set(second.files)


def weights_in_memory(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_block_by_block(tmp_path: Path, tied: bool) -> None:
    folder = tiny_llama(tmp_path / "model", layers=3, tied=tied)
    teacher, ids = Teacher.open(open_source(str(folder))), torch.arange(12).view(2, 6)
    most: list[int] = []
    for block in stacks_of(teacher.model)[0].blocks:
        teacher.model.get_submodule(f"{block}.mlp").register_forward_hook(
            lambda *_: most.append(weights_in_memory(teacher.model))
        )
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
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    whole = BertModel(config).eval()
    whole.save_pretrained(tmp_path)
    teacher = Teacher.open(open_source(str(tmp_path)))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(teacher.model(input_ids=ids)[0], whole(input_ids=ids)[0])


def test_a_model_that_names_no_blocks_is_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "model")
    monkeypatch.setattr("bitloft.calibrate.teacher.stacks_of", lambda model: [])
    teacher = Teacher.open(open_source(str(folder)))
    assert teacher.held == "the whole model (its class names no blocks)"
    assert not any(p.is_meta for p in teacher.model.parameters())
