"""Synaptic intelligence and FedSSI against the published formulas, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ritornello import RehearsalBuffer
from ritornello.experiments.models.build import widened
from ritornello.experiments.strategies import SI, FedSSI, SIRehearsal, Strategy
from ritornello.experiments.strategies.without_samples.importances import Importances


class Slope(nn.Module):
    """One weight: logits ``(w x, 0)``, so that the loss of label 1 is ``log(1 + exp(w x))``."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.weight * x, torch.zeros_like(x)], dim=1)


def squares(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss with easy gradients: ``(w x - y) ** 2 / 2``."""
    return (logits[:, 0] - labels) ** 2 / 2


def train(strategy: Strategy, model: Slope, steps: list[tuple[float, int]], rate: float) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    for x, y in steps:
        optimiser.zero_grad()
        strategy.backward(model, torch.tensor([x]), torch.tensor([y]))
        optimiser.step()
        strategy.end_step(model)


def test_two_tasks_by_hand() -> None:
    model = Slope(0.0)
    strategy = SI(strength=0.5, damping=0.2, criterion=squares)
    strategy.begin_task(0)
    train(strategy, model, [(1.0, 2), (2.0, 1)], rate=0.1)
    # g = (w x - y) x: from 0 with g = -2 to 0.2, with g = -1.2 to 0.32.
    assert model.weight.item() == pytest.approx(0.32)
    done = 2 * 0.2 + 1.2 * 0.12
    strategy.end_task(model)
    first = done / (0.32**2 + 0.2)
    assert strategy.importances.importance[0].item() == pytest.approx(first)
    assert strategy.importances.anchor is not None
    assert strategy.importances.anchor[0].item() == pytest.approx(0.32)

    strategy.begin_task(1)
    loss = strategy.backward(model, torch.tensor([1.0]), torch.tensor([3]))
    assert loss.item() == pytest.approx((0.32 - 3) ** 2 / 2)  # at the anchor nothing is held back
    model.zero_grad()
    train(strategy, model, [(1.0, 3), (1.0, 3)], rate=0.1)
    one = 0.32 + 0.1 * 2.68
    gradient = one - 3
    two = one - 0.1 * (gradient + 2 * 0.5 * first * (one - 0.32))
    assert model.weight.item() == pytest.approx(two)
    # What counts is the gradient of the task's own loss.
    done = 2.68 * (one - 0.32) - gradient * (two - one)
    strategy.end_task(model)
    second = first + done / ((two - 0.32) ** 2 + 0.2)
    assert strategy.importances.importance[0].item() == pytest.approx(second)
    strategy.begin_task(2)
    with torch.no_grad():
        model.weight.add_(0.1)
    loss = strategy.loss(model, torch.tensor([0.0]), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.5 * second * 0.1**2, rel=1e-5)


def test_importances_add_up_to_what_the_loss_has_lost() -> None:
    """The path integral: with small steps the sum over all weights is the fall of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, labels = torch.randn(16, 4), torch.arange(16) % 3
    strategy = SI(strength=1.0, damping=1e-3)
    strategy.begin_task(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(400):
        optimiser.zero_grad()
        losses.append(strategy.backward(model, inputs, labels).item())
        optimiser.step()
        strategy.end_step(model)
    losses.append(strategy.loss(model, inputs, labels).item())
    done = sum(each.sum().item() for each in strategy.importances.state_dict()["done"])
    assert done == pytest.approx(losses[0] - losses[-1], rel=0.01)


def test_an_importance_is_never_below_zero_and_no_step_that_was_left_out_counts() -> None:
    model, importances = Slope(1.0), Importances(damping=0.1)
    importances.begin(model)
    importances.begin_step(model)
    model.weight.grad = torch.tensor(float("inf"))
    importances.end_step(model)
    importances.begin_step(model)
    model.weight.grad = torch.tensor(2.0)
    with torch.no_grad():
        model.weight.add_(0.5)  # uphill
    importances.end_step(model)
    assert importances.state_dict()["done"][0].item() == -1.0
    importances.end_task(model)
    assert importances.importance[0].item() == 0.0


@pytest.mark.parametrize("locality", [0.2, 0.8])
def test_fedssi_by_hand(locality: float) -> None:
    model, rate, pull = Slope(0.0), 0.1, (1 - locality) / (2 * locality)
    strategy = FedSSI(
        strength=0.5, damping=0.2, locality=locality, num_reviews=2, rate=rate, criterion=squares
    )
    strategy.begin_task(0)
    train(strategy, model, [(1.0, 2)], rate=0.1)
    with torch.no_grad():
        model.weight.fill_(0.6)  # the mean of all ranks
    v, done = 0.0, 0.0  # it begins where the task began
    for x, y in ((1.0, 2.0), (2.0, 1.0)):
        strategy.review(model, torch.tensor([x]), torch.tensor([int(y)]))
        gradient = (v * x - y) * x
        after = v - rate * (gradient + pull * (v - 0.6))  # eq. 5
        done -= gradient * (after - v)  # eq. 6
        v = after
        assert model.weight.item() == pytest.approx(v)
    strategy.end_task(model)
    assert model.weight.item() == pytest.approx(0.6)
    assert model.weight.grad is None
    importance = done / (v**2 + 0.2)
    assert strategy.importances.importance[0].item() == pytest.approx(importance)
    strategy.begin_task(1)
    with torch.no_grad():
        model.weight.fill_(0.9)
    loss = strategy.loss(model, torch.tensor([1.0]), torch.tensor([0]))  # eq. 2
    assert loss.item() == pytest.approx(0.9**2 / 2 + 0.5 * importance * 0.3**2, rel=1e-5)


def test_a_rank_without_samples_of_a_task_adds_nothing() -> None:
    model = Slope(0.3)
    strategy = FedSSI(strength=0.5, num_reviews=1)
    strategy.begin_task(0)
    strategy.backward(model, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    strategy.review(model, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    strategy.end_task(model)
    assert strategy.importances.importance[0].item() == 0.0


def test_with_rehearsal_both_parts_are_there() -> None:
    model = nn.Linear(2, 3)
    inputs, labels = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    with RehearsalBuffer(10, num_representatives=2, asynchronous=False) as buffer:
        strategy = SIRehearsal(buffer, strength=2.0, damping=0.1)
        strategy.begin_task(0)
        strategy.backward(model, inputs, labels)
        strategy.end_task(model)
        strategy.begin_task(1)
        strategy.importances.importance[0][:] = 1.0
        with torch.no_grad():
            model.weight.add_(0.5)
        loss = strategy.loss(model, inputs, labels)
        assert buffer.num_past == 2
        past = nn.functional.cross_entropy(model(inputs), labels)  # not the same samples
        held_back = 2.0 * 6 * 0.25
        assert loss.item() > held_back
        assert abs(loss.item() - held_back - past.item()) < 1.0


@pytest.mark.parametrize("num_states", [1, 2])
def test_it_goes_on_from_its_state(num_states: int) -> None:
    def made() -> tuple[SI, Slope]:
        strategy = SI(strength=0.5, damping=0.2, criterion=squares, is_alone=num_states > 1)
        return strategy, Slope(0.0)

    steps = [(1.0, 2), (2.0, 1), (1.0, 0)]
    (strategy, model), (other, copy) = made(), made()
    strategy.begin_task(0)
    train(strategy, model, steps, rate=0.1)
    strategy.end_task(model)
    strategy.begin_task(1)
    train(strategy, model, steps[:1], rate=0.1)
    state: dict[str, Any] = strategy.state_dict()
    shared: dict[str, Any] = strategy.shared_state_dict()
    copy.load_state_dict(model.state_dict())
    for number in range(2):
        other.begin_task(number)
    if num_states == 1:
        other.load_state_dict(state)
        other.load_shared_state_dict(shared)
    else:  # of two ranks that make steps of their own, and had the same
        other.load_shared_state_dict(shared)
        other.adopt([state, state])
    for each, weights in ((strategy, model), (other, copy)):
        train(each, weights, steps[1:], rate=0.1)
        each.end_task(weights)
    assert model.weight.item() == copy.weight.item()
    assert other.importances.importance == strategy.importances.importance


@pytest.mark.parametrize("kind", [SI, FedSSI])
def test_weights_of_further_classes_are_not_important_and_anchored_where_they_begin(
    kind: type[SI] | type[FedSSI],
) -> None:
    torch.manual_seed(0)
    before, now = (nn.Sequential(nn.Linear(2, 4), nn.Linear(4, num)) for num in (3, 5))
    strategy, other = kind(strength=0.5), kind(strength=0.5)
    strategy.importances.begin(before)
    strategy.end_task(before)
    for each in strategy.importances.importance:
        each.fill_(2.0)
    other.follow(strategy.left(lambda content: [content]), 0, 1)
    now.load_state_dict(widened(before.state_dict(), now.state_dict()))
    other.importances.begin(now)
    assert other.importances.surrogate(now) == 0
    with torch.no_grad():
        for weight in now.parameters():
            weight.add_(1.0)
    num_old = 2 * 4 + 4 + 4 * 3 + 3
    assert other.importances.surrogate(now).item() == pytest.approx(2.0 * num_old)
    with pytest.raises(ValueError, match=r"of another model: see \(4, 2\) and \(4, 3\)"):
        other.importances.begin(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    with pytest.raises(ValueError, match="of another model: see 4 and 2 weights"):
        other.importances.begin(nn.Linear(2, 4))


def test_a_run_leaves_importances_of_each_rank_where_these_make_steps_of_their_own() -> None:
    def importance(of_run: FedSSI | SI) -> float:
        return of_run.importances.importance[0].item()

    def made(value: float, kind: type[Any] = FedSSI, **settings: Any) -> Any:
        strategy = kind(strength=1.0, **settings)
        strategy.importances.begin(Slope(0.0))
        strategy.importances.importance[0].fill_(value)
        return strategy

    states = [made(value).importances.state_dict() for value in (1.0, 3.0)]
    left = made(1.0).left(lambda own: states)
    for settings, rank, num_ranks, expected in (
        ({}, 1, 2, 3.0),  # its own
        ({}, 0, 3, 2.0),  # there was none of that number of ranks: the mean
        ({"kind": SI}, 1, 2, 2.0),  # all are to have the same
    ):
        other = made(0.0, **settings)
        other.follow(left, rank, num_ranks)
        assert importance(other) == expected
    shared = made(5.0, SI).left(lambda own: pytest.fail("all ranks have the same"))
    for kind in (SI, FedSSI):
        other = made(0.0, kind)
        other.follow(shared, 1, 2)
        assert importance(other) == 5.0


def test_no_step_without_a_task() -> None:
    with pytest.raises(RuntimeError, match="no task has begun"):
        SI(strength=1.0).loss(Slope(0.0), torch.ones(1), torch.tensor([0]))
