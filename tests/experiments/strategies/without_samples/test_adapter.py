"""Strategies with adapters: what they compute, and that several ranks compute what one would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ritornello import RehearsalBuffer
from ritornello.experiments.models.adapters import adapt, adapters_of, grow, orthogonal_loss
from ritornello.experiments.models.optimiser import optimiser_of
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.strategies import Adapter, AdapterRehearsal, GlobalSizes
from ritornello.experiments.training import run as train
from ritornello.testing import spawn_ranks

pytestmark = pytest.mark.usefixtures("forked_ranks")


def model_of(num_tasks: int) -> nn.Module:
    """Whose adapters of earlier tasks do something."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, num_classes=6
    )
    model.pretrained_cfg = {"classifier": "head"}
    adapt(model, 1, 2, 0.1, torch.zeros(1, 1, 8, 8))
    for _ in range(num_tasks):
        grow([model], seed=5)
        with torch.no_grad():
            for adapter in adapters_of(model):
                adapter.up[-1].normal_()
                adapter.down[-1].add_(0.1)
    return model.double()


def batch(count: int, seed: int, classes: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.tensor(classes)[torch.arange(count) % len(classes)]


def begun(strategy: Adapter | AdapterRehearsal) -> Any:
    for number in range(2):
        strategy.begin_task(number, (2 * number, 2 * number + 1))
    return strategy


# What is learnt.


def test_only_the_tasks_classes_compete_and_adapters_are_held_apart() -> None:
    model, (images, labels) = model_of(2), batch(5, 1)
    loss = begun(Adapter(orthogonality=0.5)).backward(model, images, labels)
    logits = model(images)
    among_two = nn.functional.cross_entropy(logits[:, 2:4], labels - 2)
    apart = orthogonal_loss(model)
    assert apart > 0.1
    torch.testing.assert_close(loss, (among_two + 0.5 * apart).detach())
    head = model.get_submodule("head")
    for gradient in (head.weight.grad, head.bias.grad):
        rows = gradient.reshape(6, -1).abs().sum(dim=1)
        assert (rows > 0).tolist() == [False, False, True, True, False, False]


def test_a_samples_own_class_competes_also_where_it_came_with_an_earlier_task() -> None:
    model, (images, _) = model_of(1), batch(3, 1)
    losses = begun(Adapter()).loss(model, images, torch.tensor([0, 2, 3]))
    logits = model(images)
    expected = nn.functional.cross_entropy(logits[:1, [0, 2, 3]], torch.tensor([0]))
    expected = expected + nn.functional.cross_entropy(
        logits[1:, 2:4], torch.tensor([0, 1]), reduction="sum"
    )
    torch.testing.assert_close(losses, expected / 3)


def test_rehearsal_has_all_classes_compete() -> None:
    model, (images, labels) = model_of(2), batch(5, 1)
    with RehearsalBuffer(10, num_representatives=3, asynchronous=False) as buffer:
        strategy = begun(AdapterRehearsal(buffer, orthogonality=0.5))
        apart = 0.5 * orthogonal_loss(model)
        for num_past in (0, 3):
            loss = strategy.loss(model, images, labels)
            assert buffer.num_past == num_past
            if not num_past:
                expected = nn.functional.cross_entropy(model(images), labels) + apart
                torch.testing.assert_close(loss, expected)
        loss.backward()
    assert model.get_submodule("head").weight.grad.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_no_step_changes_what_earlier_tasks_have_learnt(optimiser: str) -> None:
    """Neither momentum nor weight decay: the optimiser is a new one, and the last layer has none."""
    model = model_of(2)
    recipe = recipe_named(
        "digits", strategy="adapter", optimiser=optimiser, momentum=0.9, weight_decay=0.1
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strategy, stepping = begun(Adapter()), optimiser_of(recipe, model)
    for step in range(3):
        stepping.zero_grad()
        strategy.backward(model, *batch(5, step))
        stepping.step()
    now = model.state_dict()
    for name in ("head.weight", "head.bias"):
        same = (before[name] == now[name]).reshape(6, -1).all(dim=1).tolist()
        assert same == [True, True, False, False, True, True]
    changed = {name for name, value in before.items() if not torch.equal(value, now[name])}
    ends = {name.rpartition("adapter.")[2] for name in changed}
    assert ends == {"head.weight", "head.bias", "down.1", "up.1"}


def test_with_rehearsal_the_last_layer_decays_like_all_else() -> None:
    recipe = recipe_named("digits", strategy="adapter-rehearsal", weight_decay=0.1)
    [group] = optimiser_of(recipe, model_of(1)).param_groups
    assert group["weight_decay"] == 0.1


# Several ranks.


def gradients(sizes: GlobalSizes | None, rows: slice) -> dict[str, Tensor]:
    model: nn.Module = model_of(2)
    wrapped = model if sizes is None else DistributedDataParallel(model)
    images, labels = batch(7, 1)
    begun(Adapter(orthogonality=0.5, sizes=sizes)).backward(wrapped, images[rows], labels[rows])
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def on_rank(rank: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The averaged gradients of unequal parts of 7 samples, and blocks that were grown."""
    rows = slice(4) if rank == 0 else slice(4, 7)
    averaged = gradients(GlobalSizes(rank, 2, num_new=7, num_past=2), rows)
    model = model_of(1)
    if rank:  # as where the last bits differ
        with torch.no_grad():
            for adapter in adapters_of(model):
                adapter.down[0].mul_(1.01)
    grow([model], seed=5)
    return averaged, [adapter.down[1].detach() for adapter in adapters_of(model)]


def test_two_ranks_compute_what_one_would_and_grow_alike() -> None:
    alone = gradients(None, slice(7))
    everyone: Any = spawn_ranks(2, on_rank)
    assert all(isinstance(each, tuple) for each in everyone), everyone
    (first, blocks), (second, others) = everyone
    assert first.keys() == second.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(first[name], gradient)
        assert torch.equal(first[name], second[name])
    assert all(map(torch.equal, blocks, others))


# What is refused.


def test_a_task_must_say_its_classes() -> None:
    with pytest.raises(ValueError, match="adapter: begin_task needs the classes that the task"):
        Adapter().begin_task(0)
    with pytest.raises(RuntimeError, match="no task has begun"):
        Adapter().loss(model_of(1), *batch(2, 0))


def test_a_model_without_adapters() -> None:
    with pytest.raises(ValueError, match="the model has no adapters: let `adapt` put them in"):
        begun(Adapter()).loss(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).double(), *batch(2, 0))


@pytest.mark.parametrize("strategy", ["adapter", "adapter-rehearsal"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapted_stages": 0}, "adapted_stages=0: it must be at least 1"),
        ({"adapter_width": 0}, "adapter_width=0: it must be at least 1"),
        ({"adapter_scale": 0.0}, "adapter_scale=0.0: it must be above 0"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0: it must be 0 or more"),
        ({"backbone_rate": 0.5}, "backbone_rate=0.5 with strategy='adapter.*: all layers but the"),
        ({"keeps_optimiser": True}, "keeps_optimiser=True with strategy='adapter.*: each task has"),
        ({"model": "mlp"}, "model='mlp' with strategy='adapter"),
    ],
)
def test_settings_that_are_refused(strategy: str, changes: dict[str, Any], message: str) -> None:
    recipe = recipe_named("digits", **{"model": "resnet18", "strategy": strategy} | changes)
    with pytest.raises(ValueError, match=message):
        train.check(recipe, 1)
    train.check(recipe_named("digits", **changes), 1)  # without adapters they do nothing
