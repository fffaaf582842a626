"""Soft targets: the divergence, and what of it is stored when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ritornello import RehearsalBuffer
from ritornello.experiments.strategies import Rehearsal, SoftTargets
from ritornello.experiments.strategies.soft_targets import divergence, with_further_targets

NAN = float("nan")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_is_that_of_the_known_classes(temperature: float) -> None:
    said, wanted = logits(5, 7), logits(5, 7, seed=1)
    known = [0, 2, 3, 6]
    unknown = torch.ones(7, dtype=torch.bool)
    unknown[known] = False
    targets = wanted.masked_fill(unknown, NAN)
    expected = (
        nn.functional.kl_div(
            (said[:, known] / temperature).log_softmax(dim=1),
            (wanted[:, known] / temperature).softmax(dim=1),
            reduction="none",
        ).sum(dim=1)
        * temperature**2
    )
    assert torch.allclose(divergence(said, targets, temperature), expected)


def test_without_a_soft_target_nothing_pulls() -> None:
    said = logits(3, 4).requires_grad_()
    targets = logits(3, 4, seed=1)
    targets[1] = NAN
    targets[2, 3] = NAN
    away = divergence(said, targets, 2.0)
    assert away[1] == 0.0
    away.sum().backward()
    assert said.grad is not None
    assert said.grad.isfinite().all()
    assert said.grad[1].abs().sum() == said.grad[2, 3].abs() == 0.0
    assert said.grad[0].abs().min() > 0.0


def samples(count: int, classes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=generator)]
    return torch.randn(count, 4, generator=generator), labels


def soft_targets(buffer: RehearsalBuffer, **options: Any) -> SoftTargets:
    return SoftTargets(buffer, **({"weight": 1.0, "num_classes": 6} | options))


def test_representatives_get_logits_at_each_tasks_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
    with RehearsalBuffer(40, num_representatives=4) as buffer:
        strategy = soft_targets(buffer)
        for number, classes in enumerate([(0, 1), (2, 3)]):
            strategy.begin_task(number, classes)
            for step in range(3):
                strategy.backward(model, *samples(8, classes, 10 * number + step))
            images, labels, stored = strategy.draw()[0]
            strategy.offer(images, labels, stored)
            if number == 0:
                assert stored is not None
                assert stored.isnan().all()
            strategy.end_task(model)
            assert model.training
            with torch.no_grad():
                model[0].weight.mul_(1.5)  # what was stored must not follow
        reference = nn.Sequential(nn.Linear(4, 6))
        reference[0].load_state_dict(model[0].state_dict())
        with torch.no_grad():
            reference[0].weight.div_(1.5)
        [(images, labels, stored)] = buffer.representatives()
        assert {0, 2} <= set(labels.tolist())
        expected = reference(images).detach()
        assert torch.allclose(stored[:, :4], expected[:, :4], atol=1e-6)
        assert stored[:, 4:].isnan().all()


def test_the_loss_adds_the_divergence_of_past_samples() -> None:
    model = nn.Linear(4, 6)
    past = (*samples(3, (0, 1), 1), logits(3, 6).float())
    past[2][0] = NAN

    class Scripted:
        num_draws = 1

        def update(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            assert batch[2].isnan().all()
            return tuple(map(torch.cat, zip(batch, past, strict=True)))

    strategy = soft_targets(Scripted(), weight=3.0, temperature=2.0)  # type: ignore[arg-type]
    strategy.begin_task(1, (2, 3))
    new = samples(5, (2, 3), 2)
    images = torch.cat((new[0], past[0]))
    losses = nn.functional.cross_entropy(
        model(images), torch.cat((new[1], past[1])), reduction="none"
    )
    losses[5:] += 3.0 * divergence(model(past[0]), past[2], 2.0)
    assert torch.allclose(strategy.loss(model, *new), losses.mean())


def test_the_classes_must_be_given() -> None:
    with RehearsalBuffer(4, num_representatives=1) as buffer:
        strategy = soft_targets(buffer)
        with pytest.raises(ValueError, match="soft targets: begin_task needs the classes"):
            strategy.begin_task(0)
        assert isinstance(strategy, Rehearsal)


def test_a_task_that_was_trained_on_must_end() -> None:
    model = nn.Linear(4, 6)
    with RehearsalBuffer(40, num_representatives=4) as buffer:
        strategy = soft_targets(buffer)
        for number in range(3):  # what a run does that goes on with a later task
            strategy.begin_task(number, (number,))
        strategy.backward(model, *samples(8, (2,), 0))
        strategy.begin_task(2, (2,))
        with pytest.raises(RuntimeError, match=r"task 2 has not ended.* call strategy.end_task"):
            strategy.begin_task(3, (3,))
        strategy.end_task(model)
        strategy.begin_task(3, (3,))
        assert strategy.task_number == 3


def test_further_classes_are_not_known() -> None:
    images, labels = samples(3, (0, 1), 0)
    stored = logits(3, 2).half()
    widened = with_further_targets((images, labels, stored), 5, torch.float16)
    assert torch.equal(widened[2][:, :2], stored)
    assert widened[2].shape == (3, 5)
    assert widened[2][:, 2:].isnan().all()
    unknown = with_further_targets((images, labels), 5, torch.float16)[2]
    assert (unknown.shape, unknown.dtype) == ((3, 5), torch.float16)
    assert unknown.isnan().all()
