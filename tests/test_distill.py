"""A short course of training: what is held out, what is minimized, how it goes down and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitloft.errors import BitloftError, DataError
from bitloft.tasks import distill
from bitloft.tasks.distill import Batch, Course, descend, divergences, hold_out, mean_loss, pace
from bitloft.tasks.lm import Collator, Example

COLLATE = Collator(0)


def examples(rows: list[int]) -> list[Example]:
    return [Example(torch.tensor([i + 1, 2, 3]), torch.tensor([i + 1, 2, 3]), row) for i, row in enumerate(rows)]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=40))
def test_the_last_tenth_of_the_rows_is_held_out(blocks: list[int]) -> None:
    found = examples([row for row, count in enumerate(blocks) for _ in range(count)])
    learned, judged = hold_out(found)
    assert learned + judged == found
    assert not {e.row for e in learned} & {e.row for e in judged}  # blocks of one row stay together
    assert len({e.row for e in judged}) == max(len(blocks) // 10, 1)


def test_of_one_document_it_is_the_last_blocks() -> None:
    learned, judged = hold_out(examples([0] * 20))
    assert (len(learned), len(judged)) == (18, 2)
    with pytest.raises(DataError, match="the data is one sequence; give two or more"):
        hold_out(examples([0]))


def test_the_held_out_part_is_bounded() -> None:
    learned, judged = hold_out(examples(list(range(2000))))
    assert (len(learned), len(judged)) == (1800, distill.HELD_OUT_LIMIT)


def test_divergences_are_the_definition_and_so_is_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CHUNK", 3 * 11)  # three rows at a time
    logits, wanted = torch.randn(8, 11, requires_grad=True), 3 * torch.randn(8, 11)
    weights = torch.rand(8)
    (divergences(logits, wanted) * weights).sum().backward()
    other = logits.detach().clone().requires_grad_()
    exact = torch.nn.functional.kl_div(
        other.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    (exact * weights).sum().backward()
    torch.testing.assert_close(divergences(logits, wanted), exact)
    torch.testing.assert_close(logits.grad, other.grad)
    assert float(divergences(wanted, wanted).abs().max()) < 1e-6


@given(st.integers(1, 300))
def test_the_learning_rate_rises_and_falls_to_almost_nothing(steps: int) -> None:
    course = [pace(step, steps) for step in range(1, steps + 1)]
    assert all(0 < share <= 1 for share in course)
    assert max(course) == 1
    peak = course.index(1.0)
    assert course[: peak + 1] == sorted(course[: peak + 1])
    assert course[peak:] == sorted(course[peak:], reverse=True)


def test_it_goes_down_the_same_way_twice() -> None:
    def run(seed: int) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.full((8,), 5.0))

        def losses(batch: Batch) -> torch.Tensor:
            return (parameter - batch["input_ids"][:, 0].float().mean()).square()

        course = Course(steps=40, lr=0.3, batch=3, seed=seed)
        told: list[tuple[int, int, str]] = []
        groups = [{"params": [parameter], "pace": 1.0}]
        descend(losses, groups, examples([*range(4)]), COLLATE, course, lambda *x: told.append(x))
        assert [(done, steps) for done, steps, _ in told] == [(i, 40) for i in range(1, 41)]
        return parameter.detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert float((run(0) - 2.5).abs().max()) < 1


def test_a_loss_that_is_not_finite_stops_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [parameter], "pace": 1.0}]
    with pytest.raises(BitloftError, match="the loss became nan at step 1; lower the learning rate"):
        descend(lambda batch: parameter * torch.nan, groups, examples([0, 1]), COLLATE, Course(3, 0.1, 2, 0))
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_mean_loss_is_over_targets() -> None:
    found = [Example(torch.arange(n), torch.arange(n), n) for n in (3, 9)]
    counted = mean_loss(lambda batch: batch["labels"][:, 1:][batch["labels"][:, 1:] >= 0].float(), found, COLLATE, 1)
    assert counted == (sum([*range(1, 3), *range(1, 9)]) / 10, 10)
