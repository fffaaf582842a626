"""Last layers that are solved for: what they are, whatever the order and the number of ranks."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ritornello.experiments.strategies.without_samples.class_means import ClassMeans
from ritornello.experiments.strategies.without_samples.ridge import Ridge
from ritornello.testing import spawn_ranks

pytestmark = pytest.mark.usefixtures("forked_ranks")

NUM_CLASSES, WIDTH, NUM_RANKS = 5, 8, 3

KINDS = {"means": ClassMeans, "ridge": partial(Ridge, penalty=0.1)}


def samples(num: int = 90) -> tuple[Tensor, Tensor]:
    """Features, and labels of which the last class is none."""
    dice = torch.Generator().manual_seed(7)
    labels = torch.randint(NUM_CLASSES - 1, (num,), generator=dice)
    centres = torch.randn(NUM_CLASSES, WIDTH, generator=dice)
    return centres[labels] + torch.randn(num, WIDTH, generator=dice) + 0.5, labels


def model(bias: bool = True) -> Any:
    layer = nn.Linear(WIDTH, NUM_CLASSES, bias=bias)
    return SimpleNamespace(last_layer=layer, features=lambda images: images)


def learnt(strategy: Any, batches: list[Any], network: Any) -> Tensor:
    """The logits of all samples, when a task of each batch has passed by."""
    for number, (features, labels) in enumerate(batches):
        strategy.begin_task(number)
        strategy.observe(network, features, labels)
        strategy.end_task(network)
    logits: Tensor = network.last_layer(samples()[0]).detach()
    return logits


def test_the_nearest_mean_wins() -> None:
    features, labels = samples()
    logits = learnt(ClassMeans(NUM_CLASSES), [(features, labels)], model())
    means = torch.stack([features[labels == each].mean(0) for each in range(NUM_CLASSES - 1)])
    distances = torch.cdist(features, means) ** 2
    expected = (features**2).sum(1, keepdim=True) - distances
    torch.testing.assert_close(logits[:, :-1], expected, atol=1e-4, rtol=1e-4)
    assert (logits[:, -1] == -torch.inf).all(), "a class that has not come is never said"


def test_ridge_minimises_what_it_says() -> None:
    features, labels = samples()
    network, penalty = model(), 0.1
    learnt(Ridge(NUM_CLASSES, penalty=penalty), [(features, labels)], network)
    x, y = features.double().numpy(), np.eye(NUM_CLASSES)[labels]
    scale = (x**2).sum(0).mean()
    # The penalty as further samples, of which the bias sees nothing.
    further = np.sqrt(penalty * scale) * np.eye(WIDTH)
    rows = np.block([[x, np.ones((len(x), 1))], [further, np.zeros((WIDTH, 1))]])
    [expected, *_] = np.linalg.lstsq(rows, np.concatenate([y, 0 * further[:, :NUM_CLASSES]]))
    layer = network.last_layer
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected[:-1].T, atol=1e-5)
    np.testing.assert_allclose(layer.bias.detach().numpy()[:-1], expected[-1][:-1], atol=1e-5)


def in_parts(features: Tensor, labels: Tensor, order: list[int]) -> list[Any]:
    return [(features[labels == each], labels[labels == each]) for each in order]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tasks_makes_no_difference(kind: str) -> None:
    features, labels = samples()
    at_once = learnt(KINDS[kind](NUM_CLASSES), [(features, labels)], model())
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        parts = in_parts(features, labels, order)
        torch.testing.assert_close(learnt(KINDS[kind](NUM_CLASSES), parts, model()), at_once)


def layers_on_ranks(rank: int) -> dict[str, list[Tensor]]:
    return {kind: layers(kind, rank, NUM_RANKS) for kind in KINDS}


def layers(kind: str, rank: int, num_ranks: int) -> list[Tensor]:
    """What a rank has learnt with its part; with what another number of ranks had; with nothing."""
    features, labels = samples()
    own = features[rank::num_ranks], labels[rank::num_ranks]
    found = [learnt(KINDS[kind](NUM_CLASSES), [own], model())]
    states = []
    for part in range(5):
        before = KINDS[kind](NUM_CLASSES)
        before.observe(model(), features[part::5], labels[part::5])
        states.append(before.state_dict())
    adopted: Any = KINDS[kind](NUM_CLASSES)
    adopted.adopt(states)
    found.append(learnt(adopted, [(features[:0], labels[:0])], model()))
    lazy, network = KINDS[kind](NUM_CLASSES), model()
    if rank == 1:
        lazy.observe(network, features, labels)
    lazy.end_task(network)
    found.append(network.last_layer(features).detach())
    return found


def test_the_number_of_ranks_makes_no_difference() -> None:
    ranks = spawn_ranks(NUM_RANKS, layers_on_ranks)
    first: Any = ranks[0]
    for kind, make in KINDS.items():
        alone = learnt(make(NUM_CLASSES), [samples()], model())
        for found in ranks:
            assert isinstance(found, dict), found
            for logits, same in zip(found[kind], first[kind], strict=True):
                torch.testing.assert_close(logits, alone)
                assert torch.equal(logits, same), "all ranks have the same bits"


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_within_a_task_and_with_further_classes(kind: str) -> None:
    features, labels = samples()
    batches = in_parts(features, labels, [0, 1, 2, 3])
    expected = learnt(KINDS[kind](NUM_CLASSES), batches, model())
    narrow = SimpleNamespace(last_layer=nn.Linear(WIDTH, 2), features=lambda images: images)
    first: Any = KINDS[kind](2)
    for batch in batches[:2]:
        first.observe(narrow, *batch)
        first.end_task(narrow)
    middle: Any = KINDS[kind](NUM_CLASSES)
    middle.load_shared_state_dict(first.shared_state_dict())
    middle.observe(model(), *batches[2])
    last: Any = KINDS[kind](NUM_CLASSES)
    last.load_shared_state_dict(middle.shared_state_dict())
    last.load_state_dict(middle.state_dict())
    torch.testing.assert_close(learnt(last, batches[3:], model()), expected)


def test_a_mini_batch_without_samples_does_not_reach_the_model() -> None:
    """Some models cannot see one."""
    strategy, network = ClassMeans(NUM_CLASSES), model()
    expected = learnt(ClassMeans(NUM_CLASSES), [samples()], network)
    features, labels = samples()
    broken = SimpleNamespace(last_layer=network.last_layer, features=None)
    strategy.observe(broken, features[:0], labels[:0])  # type: ignore[arg-type]
    assert torch.equal(learnt(strategy, [(features, labels)], network), expected)


def test_it_makes_no_steps() -> None:
    with pytest.raises(RuntimeError, match="ClassMeans makes no steps: call observe for each"):
        ClassMeans(NUM_CLASSES).backward(nn.Identity(), *samples())


def test_a_layer_without_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="Ridge: the model's last layer has no bias"):
        Ridge(NUM_CLASSES).end_task(model(bias=False))
