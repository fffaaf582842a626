"""Generated past samples: what is computed, that all ranks have the same, and going on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ritornello import RehearsalBuffer
from ritornello.experiments.models.generator import GeneratorSettings
from ritornello.experiments.strategies import (
    GeneratedPast,
    Generative,
    GlobalSizes,
    PartlyGenerated,
    Strategy,
)
from ritornello.experiments.strategies.base import cross_entropy
from ritornello.experiments.strategies.distances import squared
from ritornello.testing import spawn_ranks

NUM_CLASSES = 4

SHAPE = (1, 3, 3)


class Model(nn.Module):
    """Takes images as they are stored; with dropout, to see in which mode it is asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(9, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.dropout(images.flatten(1).float() / 255))
        return logits


def settings(**changes: Any) -> GeneratorSettings:
    return GeneratorSettings(**({"num_latents": 3, "num_units": 8} | changes))


def past_of(
    count: int,
    sizes: GlobalSizes | None = None,
    seed: int = 5,
    trusts_class: bool = False,
    **changes: Any,
) -> GeneratedPast:
    return GeneratedPast(
        count,
        NUM_CLASSES,
        settings(**changes),
        sizes=sizes,
        seed=seed,
        trusts_class=trusts_class,
    )


def batch(seed: int, count: int = 6, classes: tuple[int, ...] = (0, 1)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=generator)]
    noise = torch.randint(50, (count, *SHAPE), generator=generator)
    return (noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels


def learnt(
    strategy: Strategy, model: nn.Module, num_steps: int = 4, tasks: int = 1, rate: float = 0.1
) -> None:
    """Some steps in each of some tasks, which all end."""
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    for number in range(tasks):
        classes = (2 * number, 2 * number + 1)
        strategy.begin_task(number, classes)
        for step in range(num_steps):
            optimiser.zero_grad()
            strategy.backward(model, *batch(10 * number + step, classes=classes))
            optimiser.step()
        strategy.end_task(model)


def images_of(past: GeneratedPast, model: nn.Module) -> Tensor:
    drawn = past.draw(model, torch.zeros(0))
    assert drawn is not None
    return drawn.images


# What is drawn.


def test_draws_are_of_each_class_so_far_equally_often_and_look_like_the_samples() -> None:
    model = Model()
    strategy = Generative(past_of(400, trusts_class=True))
    strategy.begin_task(0, (0, 1))
    assert strategy.past.draw(model, torch.zeros(0)) is None
    learnt(strategy, model)
    for classes in ((0, 1), (0, 1, 2, 3)):
        drawn = strategy.past.draw(model, torch.zeros(0))
        assert drawn is not None
        assert (drawn.images.shape, drawn.images.dtype) == ((400, *SHAPE), torch.uint8)
        assert drawn.logits is None  # nobody asks for them
        counts = drawn.labels.bincount(minlength=4)
        assert counts.nonzero().flatten().tolist() == list(classes)
        assert (counts[list(classes)] - 400 / len(classes)).abs().max() < 60
        learnt(strategy, model, tasks=2)


def test_a_draw_is_that_of_its_seed_rank_and_step_alone() -> None:
    model = Model()
    draws = {}
    for seed, rank, num_ranks in ((5, 0, 2), (5, 1, 2), (5, 1, 3), (6, 0, 2)):
        sizes = GlobalSizes(rank, num_ranks, 12, 4 * num_ranks)
        past = past_of(4, sizes, seed)
        learnt(Generative(past), model, num_steps=1)
        before = torch.get_rng_state()
        draws[seed, rank, num_ranks] = [images_of(past, model) for _ in range(3)]
        assert torch.equal(before, torch.get_rng_state())
    # Generators of one seed are the same, as they have learnt the same from the same latents.
    first, other, of_three, of_seed = draws.values()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], of_seed[0])
    assert all(torch.equal(a, b) for a, b in zip(other, of_three, strict=True))


def test_until_the_next_tasks_end_nothing_that_learns_changes_the_draws() -> None:
    draws = []
    for num_more in (0, 3):
        model = Model()
        strategy = Generative(past_of(4, is_conditional=False))
        learnt(strategy, model)
        frozen = copy.deepcopy(strategy.past.state_dict()["frozen"])
        strategy.begin_task(1, (2, 3))
        for step in range(num_more):
            strategy.backward(model, *batch(step, classes=(2, 3)))
            with torch.no_grad():
                model.last.weight.mul_(-2)
        strategy.past._step = 50
        draws.append(strategy.past.draw(model, torch.zeros(0)))
        now = strategy.past.state_dict()
        assert all(torch.equal(now["frozen"][name], value) for name, value in frozen.items())
        changed = any(not torch.equal(now["generator"][name], frozen[name]) for name in frozen)
        assert changed == (num_more > 0)
    for leaf in range(3):
        assert torch.equal(draws[0][leaf], draws[1][leaf])


@pytest.mark.parametrize("is_conditional", [True, False])
def test_what_is_made_is_labelled_by_the_model_as_it_was(is_conditional: bool) -> None:
    model = Model()
    strategy = Generative(past_of(50, is_conditional=is_conditional))
    learnt(strategy, model, rate=3.0)
    then = copy.deepcopy(model).eval()
    model.last.weight.data.neg_()
    with torch.no_grad():  # it must not be asked of what it does not know
        then.last.bias[3] = model.last.bias[3] = 1e6
    strategy.past._model_then["last.bias"][3] = 1e6
    model.dropout.eval()
    drawn = strategy.past.draw(model, torch.zeros(0))
    assert drawn is not None
    assert (model.training, model.dropout.training, model.last.training) == (True, False, True)
    torch.testing.assert_close(drawn.logits, then(drawn.images).detach())
    assert torch.equal(drawn.labels, then(drawn.images)[:, :2].argmax(dim=1))


# What is computed.


def reference(
    strategy: Strategy, model: nn.Module, real: list[tuple[Tensor, Tensor]], made: Any
) -> Tensor:
    """The loss in the second task, by hand: new, perhaps stored, and generated samples."""
    number_of_new = len(real[0][1])
    images = torch.cat([*(each for each, _ in real), made.images])
    labels = torch.cat([*(each for _, each in real), made.labels])
    losses = cross_entropy(model(images), labels)
    past = losses[number_of_new:]
    if isinstance(strategy, Generative) and strategy.distillation:
        away = squared(model(made.images), made.logits)
        past = torch.cat((past[: -len(away)], past[-len(away) :] + 0.3 * away))
    if strategy.loss_weights == "by-task":
        return losses[:number_of_new].mean() / 2 + past.mean() / 2
    return (losses[:number_of_new].sum() + past.sum()) / len(labels)


@pytest.mark.parametrize("loss_weights", ["by-sample", "by-task"])
@pytest.mark.parametrize("distillation", [0.0, 0.3])
def test_the_loss_by_hand(loss_weights: str, distillation: float) -> None:
    model = Model()
    model.dropout.p = 0.0
    options: dict[str, Any] = {"loss_weights": loss_weights, "distillation": distillation}
    alone = Generative(past_of(4), **options)
    learnt(alone, model)
    alone.begin_task(1, (2, 3))
    new = batch(7, classes=(2, 3))
    made = copy.deepcopy(alone.past).draw(model, new[0])
    expected = reference(alone, model, [new], made)
    torch.testing.assert_close(alone.loss(model, *new), expected)

    with RehearsalBuffer(20, num_representatives=3) as buffer:
        partly = PartlyGenerated(past_of(4), buffer, **options)
        learnt(partly, model)
        partly.begin_task(1, (2, 3))
        stored: list[tuple[Tensor, Tensor]] = []
        update = buffer.update

        def spied(leaves: tuple[Tensor, ...]) -> Any:
            joined = update(leaves)
            stored.append((joined[0][6:], joined[1][6:]))
            return joined

        buffer.update = spied  # type: ignore[method-assign, assignment]
        made = copy.deepcopy(partly.past).draw(model, new[0])
        loss = partly.loss(model, *new)
        assert len(stored[0][1]) == 3
        torch.testing.assert_close(loss, reference(partly, model, [new, stored[0]], made))


SPLITS = {"even": ([4, 4, 4], 9), "uneven": ([4, 3, 3], 7)}
"""New samples of each of three ranks, and what they generate together."""

KINDS: dict[str, Callable[[GeneratedPast, GlobalSizes], Strategy]] = {
    "by-task": lambda past, sizes: Generative(past, sizes=sizes, loss_weights="by-task"),
    "by-sample": lambda past, sizes: Generative(past, sizes=sizes, distillation=0.5),
}


def made_for(kind: str, split: str, rank: int) -> tuple[Strategy, tuple[Tensor, Tensor]]:
    """A rank's strategy, and what it trains on in the second task."""
    new, num_generated = SPLITS[split]
    sizes = GlobalSizes(rank, 3, sum(new), num_generated)
    past = past_of(3, sizes, prior="dirichlet" if kind == "by-task" else "gaussian")
    return KINDS[kind](past, sizes), batch(rank, new[rank], (2, 3))


def rank_main(rank: int) -> dict[tuple[str, str], Any]:
    """Of each kind and split: gradients of model and generator, and what came of several steps."""
    found: dict[tuple[str, str], Any] = {}
    for kind in KINDS:
        for split in SPLITS:
            strategy, step = made_for(kind, split, rank)
            network = DistributedDataParallel(Model().eval())
            learnt(strategy, network, num_steps=2)
            assert isinstance(strategy, Generative)
            before = copy.deepcopy(strategy.past.state_dict())
            network.zero_grad()
            strategy.begin_task(1, (2, 3))
            strategy.backward(network, *step)
            assert strategy.past._generator is not None
            gradients = [
                [each.grad.clone() for each in model.parameters()]
                for model in (network, strategy.past._generator)
            ]
            model_then = copy.deepcopy(network.module.state_dict())
            strategy.end_task(network)
            state = strategy.past.state_dict()
            drawn = strategy.past.draw(network, step[0])
            found[kind, split] = before, model_then, gradients, state, drawn
            assert strategy.costs(network)["sent_bytes_per_step"] > 0
    return found


@pytest.fixture(scope="module")
def of_three_ranks() -> Any:
    everyone: Any = spawn_ranks(3, rank_main)
    assert all(isinstance(each, dict) for each in everyone), everyone
    return everyone


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_global_mini_batch(
    kind: str, split: str, of_three_ranks: Any
) -> None:
    """Of the model and of the generator, which are compared with one sum over all samples."""
    new, num_generated = SPLITS[split]
    before, weights, first, *_ = of_three_ranks[0][kind, split]
    model = Model().eval()
    model.load_state_dict(weights)
    losses: dict[str, list[Tensor]] = {"new": [], "past": [], "g new": [], "g past": []}
    generator: Any = None
    for rank in range(3):
        strategy, (images, labels) = made_for(kind, split, rank)
        assert isinstance(strategy, Generative)
        strategy.past.load_state_dict(copy.deepcopy(before))
        made = strategy.past.draw(model, images)
        assert made is not None
        assert len(made.labels) == [3, 3, 3][rank] if split == "even" else [3, 2, 2][rank]
        if generator is None:
            generator = strategy.past._generator
        images, labels = torch.cat((images, made.images)), torch.cat((labels, made.labels))
        own = cross_entropy(model(images), labels)
        if kind == "by-sample":
            own[new[rank] :] += 0.5 * squared(model(made.images), made.logits)
        of_generator = generator.losses(images, labels, strategy.past._latents_seed)
        for name, each in (("", own), ("g ", of_generator)):
            losses[f"{name}new"].append(each[: new[rank]])
            losses[f"{name}past"].append(each[new[rank] :])
    sums = {name: torch.cat(each).sum() for name, each in losses.items()}
    for name in ("", "g "):
        if kind == "by-task":
            total = sums[f"{name}new"] / sum(new) / 2 + sums[f"{name}past"] / num_generated / 2
        else:
            total = (sums[f"{name}new"] + sums[f"{name}past"]) / (sum(new) + num_generated)
        total.backward()
    for theirs, ours in zip(first, (model, generator), strict=True):
        for mine, whole in zip(theirs, ours.parameters(), strict=True):
            torch.testing.assert_close(mine, whole.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_have_the_same_generator_bit_by_bit(
    kind: str, split: str, of_three_ranks: Any
) -> None:
    everyone = [of_rank[kind, split] for of_rank in of_three_ranks]
    for _, _, gradients, state, drawn in everyone[1:]:
        for mine, first in zip(gradients[1], everyone[0][2][1], strict=True):
            assert torch.equal(mine, first)
        for part in ("generator", "frozen", "model_then"):
            for name, value in state[part].items():
                assert torch.equal(value, everyone[0][3][part][name]), (part, name)
        assert not torch.equal(drawn.images[:2], everyone[0][4].images[:2])


# Going on.


@pytest.mark.parametrize("prior", ["gaussian", "dirichlet"])
def test_what_is_saved_goes_on_bit_by_bit(prior: str) -> None:
    def new() -> Generative:
        return Generative(past_of(4, prior=prior, is_conditional=False), distillation=0.2)

    model = Model()
    first = new()
    for number in (0, 1, 2):  # nothing is there yet; in the first task; in the second
        file = io.BytesIO()
        torch.save(first.shared_state_dict(), file)
        file.seek(0)
        second, other = new(), copy.deepcopy(model)
        for task in range(number):
            second.begin_task(task, (2 * task, 2 * task + 1))
        second.load_shared_state_dict(torch.load(file, weights_only=True))
        classes = (2 * number, 2 * number + 1) if number < 2 else (0, 1)
        for strategy, each in ((first, model), (second, other)):
            strategy.begin_task(number, classes)
            torch.manual_seed(3)
            for step in range(3):
                each.zero_grad()
                strategy.backward(each, *batch(step, classes=classes))
            strategy.end_task(each)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
        assert torch.equal(images_of(first.past, model), images_of(second.past, other))


def test_examples_are_of_the_first_classes_and_change_nothing() -> None:
    model = Model()
    strategy = Generative(past_of(4))
    assert strategy.past.examples(3, 2) is None
    assert strategy.outcome() == {}
    assert strategy.costs(model) == {"held_bytes": 0, "sent_bytes_per_step": 0}
    learnt(strategy, model, tasks=2)
    step = strategy.past._step
    examples = strategy.past.examples(3, 2)
    assert examples is not None
    assert examples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert examples.images.shape == (6, *SHAPE)
    outcome = strategy.outcome()
    assert outcome["generated"]["shape"] == [40, *SHAPE]
    num_weights = sum(each.numel() for each in strategy.past._generator.parameters())  # type: ignore[union-attr]
    num_of_model = sum(each.numel() for each in model.parameters())
    # Weights, two moments, and what is frozen; and the model as it was.
    costs = {"held_bytes": 4 * (4 * num_weights + num_of_model), "sent_bytes_per_step": 0}
    assert strategy.costs(model) == costs
    assert strategy.past._step == step


def test_in_a_loop_of_ones_own_with_features() -> None:
    """Eight floats for each sample; the first task is known after the second."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    past = GeneratedPast(16, 4, settings(num_units=32, learning_rate=0.01))
    strategy = Generative(past, loss_weights="by-task")
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    means = 2 * torch.eye(8)[:4]
    for number, classes in enumerate([(0, 1), (2, 3)]):
        strategy.begin_task(number, classes)
        for _ in range(150):
            labels = torch.tensor(classes)[torch.randint(2, (16,))]
            features = means[labels] + 0.3 * torch.randn(16, 8)
            optimiser.zero_grad()
            strategy.backward(model, features, labels)
            optimiser.step()
        strategy.end_task(model)
    labels = torch.arange(4).repeat(50)
    right = model(means[labels] + 0.3 * torch.randn(200, 8)).argmax(dim=1) == labels
    assert right.float().mean() > 0.95
    assert "generated" not in strategy.outcome()  # they are no images


# What is refused.


def test_what_a_task_must_say() -> None:
    strategy = Generative(past_of(4))
    with pytest.raises(RuntimeError, match="Generative: no task has begun"):
        strategy.backward(Model(), *batch(0))
    with pytest.raises(RuntimeError, match="Generative: no task has begun"):
        strategy.end_task(Model())
    with pytest.raises(ValueError, match="generated samples: begin_task needs the classes"):
        strategy.begin_task(0)
    with pytest.raises(ValueError, match="the task has the class 4, but num_classes=4"):
        strategy.begin_task(0, (3, 4))
    strategy.begin_task(0, (0, 1))
    strategy.backward(Model(), *batch(0))
    strategy.begin_task(0, (0, 1))
    with pytest.raises(RuntimeError, match=r"task 0 has not ended.*call strategy.end_task"):
        strategy.begin_task(1, (2, 3))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.zeros(3), torch.zeros(2)], "one tensor .* of uint8 or floats, .*, not list"),
        (torch.zeros(6, 3, dtype=torch.int64), "not torch.int64; samples of other kinds can be"),
    ],
)
def test_samples_that_it_cannot_make(samples: Any, message: str) -> None:
    strategy = Generative(past_of(4))
    strategy.begin_task(0, (0, 1))
    with pytest.raises(TypeError, match=f"generated samples: .*{message}"):
        strategy.backward(Model(), samples, torch.zeros(len(samples), dtype=torch.int64))


def test_samples_of_another_shape_than_the_first() -> None:
    strategy = Generative(past_of(4))
    strategy.begin_task(0, (0, 1))
    images, labels = batch(0)
    strategy.backward(Model(), images, labels)
    message = r"uint8 of shape \(1, 9\), but the first ones were torch.uint8 of shape \(1, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        strategy.backward(Model(), images.view(-1, 1, 9), labels)


def test_a_generator_that_has_diverged() -> None:
    strategy = Generative(past_of(4, learning_rate=1e30))
    with pytest.raises(FloatingPointError, match=r"diverged in task 1: .* is 1e\+30; take a lower"):
        learnt(strategy, Model())


def test_settings_that_break_a_rule() -> None:
    with pytest.raises(ValueError, match="num_representatives=0: it must be at least 1"):
        past_of(0)
    with pytest.raises(ValueError, match="trusts_class=True: an unconditional generator is asked"):
        past_of(4, trusts_class=True, is_conditional=False)
    with pytest.raises(ValueError, match="prior='flat': there are gaussian, dirichlet"):
        past_of(4, prior="flat")
    with pytest.raises(ValueError, match="loss_weights='best': there are by-sample, by-task"):
        Generative(past_of(4), loss_weights="best")
    with pytest.raises(ValueError, match="distance='far': there are mse, js"):
        Generative(past_of(4), distance="far")


def test_after_a_step_that_failed_the_next_ones_go_on() -> None:
    class NoMemory(Model):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with RehearsalBuffer(20, num_representatives=3) as buffer:
        strategy = PartlyGenerated(past_of(4), buffer)
        learnt(strategy, Model(), num_steps=2)
        strategy.begin_task(1, (2, 3))
        for step in range(4):
            new = batch(step, classes=(2, 3))
            if step % 2:
                with pytest.raises(torch.OutOfMemoryError):
                    strategy.backward(NoMemory(), *new)
            else:
                strategy.backward(Model(), *new)
        assert buffer.stats().num_rounds == 6
        assert np.isclose(len(buffer), 20)


@pytest.mark.accelerator
def test_on_a_device_it_draws_what_it_draws_elsewhere(accelerator: str) -> None:
    """But for rounding; and what was saved there goes on here."""
    drawn = {}
    for device in ("cpu", accelerator):
        model = Model().to(device)
        strategy = Generative(past_of(4, is_conditional=False))
        for number, classes in enumerate([(0, 1), (2, 3)]):
            strategy.begin_task(number, classes)
            for step in range(2):
                images, labels = batch(step, classes=classes)
                strategy.backward(model, images.to(device), labels.to(device))
            strategy.end_task(model)
        saved = {name: copy.deepcopy(value) for name, value in strategy.shared_state_dict().items()}
        drawn[device] = strategy.past.draw(model, images.to(device))
        here = Generative(past_of(4, is_conditional=False))
        here.load_shared_state_dict(saved)
        again = here.past.draw(Model(), torch.zeros(0))
        assert again is not None
        assert (again.images.int() - drawn[device].images.cpu().int()).abs().max() <= 1
        here.begin_task(2, (0,))
        here.backward(Model(), *batch(0, classes=(0,)))
    assert drawn[accelerator].images.device.type == torch.device(accelerator).type
    shape = drawn["cpu"].images.shape
    assert drawn[accelerator].images.shape == shape
