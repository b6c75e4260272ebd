"""The tuning loop: both terms of its loss by their definitions, a course that ends, and a saved state that is exact."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from bitloft.calibrate import tuning
from bitloft.calibrate.tuning import Losses, Student, tune
from bitloft.errors import CheckpointError
from bitloft.tasks.precision import Precision

EXACT = Precision(torch.float32, "asked for")


def student_of(folder: Path) -> Student:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    return Student(model, {name: (model.get_parameter(name), 1.0)}, EXACT)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step % 3)
    return torch.randint(0, 300, (2, 8), generator=generator), torch.randn(2, 8, 64, generator=generator)


@torch.no_grad()
def test_the_terms_follow_their_definitions(tiny_model: Path) -> None:
    student, (ids, target) = student_of(tiny_model), data(0)
    entropy, error = student.terms(ids, target)
    out = student.model(input_ids=ids, output_hidden_states=True)
    assert entropy is not None
    assert float(entropy) == pytest.approx(float(cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))
    hidden = out.hidden_states[-1]
    wanted = ((hidden - target).square().sum(-1) / target.square().sum(-1)).mean()
    assert float(error) == pytest.approx(float(wanted))
    losses = student.measure([data(0), data(1)])
    assert losses.total == pytest.approx(0.5 * (losses.next_token or 0) + 0.5 * losses.hidden)


def test_against_the_teacher_the_first_term_is_a_divergence_from_its_guess(tiny_model: Path) -> None:
    student, (ids, target) = student_of(tiny_model), data(0)
    student.against = "teacher"
    nats, error = student.terms(ids, target)
    assert nats is not None
    head = student.model.get_output_embeddings()
    guesses = (student.model(input_ids=ids).logits, head(target))
    mine, wanted = (guess.flatten(0, 1).log_softmax(-1) for guess in guesses)
    expected = kl_div(mine, wanted, log_target=True, reduction="batchmean")
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        hidden = student.model.base_model(input_ids=ids)[0]
        nothing = student.measure([(ids, hidden)])
    assert (nothing.next_token, nothing.hidden) == pytest.approx((0, 0), abs=1e-6)
    nats.backward()
    slope = student.tuned["model.layers.0.mlp.down_proj.weight"][0].grad
    assert slope is not None
    assert float(slope.norm()) > 0
    assert error.requires_grad


def test_an_encoder_has_hidden_states_alone() -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    model = BertModel(config).eval()
    losses = Student(model, {}, EXACT).measure([(torch.arange(6).view(1, 6), torch.randn(1, 6, 32))])
    assert losses == Losses(None, losses.hidden)
    assert losses.total == losses.hidden


def test_a_saved_state_goes_on_to_the_same_values(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "SAVE_EVERY", 4)
    whole = student_of(tiny_model)
    assert tune(whole, data, steps=9, rate=1e-2, state=tmp_path / "whole") == 0

    def killed(done: int, total: int, what: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(student_of(tiny_model), data, steps=9, rate=1e-2, state=tmp_path / "cut", progress=killed)
    again = student_of(tiny_model)
    assert tune(again, data, steps=9, rate=1e-2, state=tmp_path / "cut") == 4
    (one, _), (other, _) = whole.tuned.popitem()[1], again.tuned.popitem()[1]
    assert torch.equal(one, other)


def test_the_course_rises_and_ends_at_zero() -> None:
    course = [tuning._course(step, 100) for step in range(101)]
    assert course[0] == pytest.approx(0.1)
    assert max(course) == course[9]
    assert course[100] == pytest.approx(0.0)


def test_a_loss_that_is_no_number_is_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the loss of refining is nan at step 1; use a lower refine_rate"):
        tune(
            student_of(tiny_model),
            lambda step: (data(0)[0], data(0)[1] * torch.nan),
            steps=2,
            rate=1e-3,
            state=tmp_path / "s",
        )
