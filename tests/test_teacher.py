"""The teacher's states: its own forward's, asked once, never taken for another text's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitloft.calibrate import teacher as module
from bitloft.calibrate.teacher import TeacherStates
from bitloft.integrations.source import open_source


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
    monkeypatch.setattr(module.Blockwise, "open", lambda source: pytest.fail("asked again"))
    again = TeacherStates.ask(source, ids, tmp_path)
    assert (again.held, again.files) == (states.held, states.files)


def test_states_of_other_sequences_are_other_files(tiny_model: Path, tmp_path: Path) -> None:
    source, ids = open_source(str(tiny_model)), torch.ones(2, 4, dtype=torch.long)
    first = TeacherStates.ask(source, ids, tmp_path)
    second = TeacherStates.ask(source, 2 * ids, tmp_path)
    assert not set(first.files) & set(second.files)
