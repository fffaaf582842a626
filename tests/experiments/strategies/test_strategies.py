"""Strategies: what they compute, and that several ranks compute what one would."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ritornello import RehearsalBuffer
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.strategies import (
    AGEM,
    DER,
    ERACE,
    STRATEGIES,
    DERPlusPlus,
    FromScratch,
    GDumb,
    GlobalSizes,
    Incremental,
    Joint,
    Rehearsal,
    RehearsalStrategy,
    SoftTargets,
    strategy_named,
    strategy_of,
)
from ritornello.experiments.strategies.a_gem import project
from ritornello.testing import run_ranks, spawn_ranks
from ritornello.transports import LocalTransport, Transport

pytestmark = pytest.mark.usefixtures("forked_ranks")


class Step(NamedTuple):
    """What one rank trains on in one step."""

    images: Tensor
    labels: Tensor
    draws: list[tuple[Tensor, ...]]


class ScriptedBuffer:
    """Gives the draws that a test has written down, and keeps what it is offered."""

    def __init__(self, draws: list[tuple[Tensor, ...]], num_draws: int | None = None) -> None:
        self.draws, self.offered = draws, None
        self.num_draws = num_draws or max(1, len(draws))

    def draw(self) -> Any:
        if not self.draws:
            return None
        return self.draws if len(self.draws) > 1 else self.draws[0]

    def offer(self, batch: Any) -> None:
        self.offered = batch

    def update(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.offer(batch)
        if not self.draws:
            return batch
        return tuple(torch.cat(pair) for pair in zip(batch, self.draws[0], strict=True))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6)).double()


def step_of(kind: type[RehearsalStrategy], num_new: int, num_past: int, seed: int) -> Step:
    generator = torch.Generator().manual_seed(seed)

    def samples(count: int, with_logits: bool) -> tuple[Tensor, ...]:
        images = torch.randn(count, 4, generator=generator, dtype=torch.float64)
        labels = torch.randint(6, (count,), generator=generator)
        logits = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        return (images, labels, logits) if with_logits else (images, labels)

    draws = (
        [samples(num_past, kind.stores_logits) for _ in range(kind.num_draws)] if num_past else []
    )
    images, labels = samples(num_new, False)
    return Step(images, labels, draws)


OPTIONS: dict[type[RehearsalStrategy], dict[str, Any]] = {
    Rehearsal: {},
    ERACE: {},
    DER: {"alpha": 0.3, "logits_dtype": torch.float64},
    DERPlusPlus: {"alpha": 0.3, "beta": 0.7, "logits_dtype": torch.float64},
    AGEM: {},
    GDumb: {},
}


def gradients(
    kind: type[RehearsalStrategy],
    network: nn.Module,
    step: Step,
    sizes: GlobalSizes | None,
    **options: Any,
) -> list[Tensor]:
    """The gradients of one step in the second task."""
    buffer: Any = ScriptedBuffer(step.draws)
    strategy = kind(buffer, sizes=sizes, **(OPTIONS[kind] | options))
    # Of what is drawn too much, the last ones are left out.
    strategy._dice = SimpleNamespace(permutation=np.arange)  # type: ignore[assignment]
    strategy.begin_task(0, (0, 1, 2))
    strategy.begin_task(1, (3, 4, 5))
    network.zero_grad()
    strategy.backward(network, step.images, step.labels)
    return [parameter.grad.clone() for parameter in network.parameters()]


def joined(parts: list[Step], kept: list[int]) -> Step:
    """The global mini-batch of several ranks' steps, of whose draws each keeps so many."""
    draws = [
        tuple(
            torch.cat([leaf[:count] for leaf, count in zip(leaves, kept, strict=True)])
            for leaves in zip(*draw, strict=True)
        )
        for draw in zip(*(part.draws for part in parts), strict=True)
    ]
    return Step(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        draws,
    )


CASES: list[tuple[type[RehearsalStrategy], dict[str, Any]]] = [
    (Rehearsal, {}),
    (Rehearsal, {"loss_weights": "by-task"}),
    (ERACE, {}),
    (DER, {}),
    (DERPlusPlus, {}),
    (AGEM, {}),
    (GDumb, {}),
]

SPLITS = {
    "even": ([4, 4, 4], [3, 3, 3]),
    "uneven": ([4, 3, 3], [3, 2, 2]),
    "uneven-new": ([4, 3, 3], [3, 3, 3]),
}
"""New samples, and representatives, of each of three ranks; each draws three."""


def steps_and_sizes(
    kind: type[RehearsalStrategy], split: str
) -> tuple[list[Step], list[GlobalSizes | None]]:
    new, kept = SPLITS[split]
    return [step_of(kind, new[rank], 3, rank) for rank in range(3)], [
        None if split == "even" else GlobalSizes(rank, 3, sum(new), sum(kept)) for rank in range(3)
    ]


def rank_main(rank: int) -> list[list[Tensor]]:
    """The gradients of every case and split, under DistributedDataParallel."""
    found = []
    for kind, options in CASES:
        for split in SPLITS:
            steps, sizes = steps_and_sizes(kind, split)
            network = DistributedDataParallel(model())
            found.append(gradients(kind, network, steps[rank], sizes[rank], **options))
    return found


@pytest.fixture(scope="module")
def gradients_of_three_ranks() -> list[list[list[Tensor]]]:
    everyone: Any = spawn_ranks(3, rank_main)
    assert all(isinstance(each, list) for each in everyone), everyone
    return everyone


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: CASES[case][0].__name__)
def test_three_ranks_compute_the_gradients_of_the_global_mini_batch(
    case: int, split: str, gradients_of_three_ranks: list[list[list[Tensor]]]
) -> None:
    """Also where 10 samples and 7 representatives have to be split over 3 ranks."""
    kind, options = CASES[case]
    steps, _ = steps_and_sizes(kind, split)
    expected = gradients(kind, model(), joined(steps, SPLITS[split][1]), None, **options)
    number = len(SPLITS) * case + list(SPLITS).index(split)
    everyone = [of_rank[number] for of_rank in gradients_of_three_ranks]
    for own in everyone:
        assert all(torch.equal(a, b) for a, b in zip(own, everyone[0], strict=True))
        for mine, whole in zip(own, expected, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-14)


def test_the_mean_of_unequal_means_would_not_be_the_global_mean() -> None:
    """So the test above can fail."""
    steps = [step_of(DER, new, past, new) for new, past in ((4, 3), (3, 2))]
    alone = [gradients(DER, model(), each, None) for each in steps]
    expected = gradients(DER, model(), joined(steps, [3, 2]), None)
    assert not torch.allclose((alone[0][0] + alone[1][0]) / 2, expected[0], rtol=1e-3)


def reference_loss(kind: type[RehearsalStrategy], step: Step) -> Tensor:
    """The losses as the papers write them."""
    network, cross_entropy = model(), nn.functional.cross_entropy
    new = network(step.images)
    if kind is Rehearsal:
        images, labels = (torch.cat((a, b)) for a, b in zip(step[:2], step.draws[0], strict=True))
        return cross_entropy(network(images), labels)
    if kind is ERACE:
        new = torch.cat((torch.full_like(new[:, :3], -1e300), new[:, 3:]), dim=1)
        past_images, past_labels = step.draws[0]
        return cross_entropy(new, step.labels) + cross_entropy(network(past_images), past_labels)
    loss = cross_entropy(new, step.labels)
    loss = loss + 0.3 * nn.functional.mse_loss(network(step.draws[0][0]), step.draws[0][2])
    if kind is DERPlusPlus:
        images, labels, _ = step.draws[1]
        loss = loss + 0.7 * cross_entropy(network(images), labels)
    return loss


@pytest.mark.parametrize("kind", [Rehearsal, ERACE, DER, DERPlusPlus])
def test_losses_are_those_of_the_papers(kind: type[RehearsalStrategy]) -> None:
    step = step_of(kind, 5, 4, 1)
    if kind is ERACE:
        step = step._replace(labels=step.labels % 3 + 3)
    buffer: Any = ScriptedBuffer(step.draws)
    strategy = kind(buffer, **OPTIONS[kind])
    strategy.begin_task(0, (0, 1, 2))
    strategy.begin_task(1, (3, 4, 5))
    loss = strategy.loss(model(), step.images, step.labels)
    torch.testing.assert_close(loss, reference_loss(kind, step))
    offered = buffer.offered
    assert torch.equal(offered[0], step.images)
    assert torch.equal(offered[1], step.labels)
    if kind.stores_logits:
        torch.testing.assert_close(offered[2], model()(step.images).detach())
        assert not offered[2].requires_grad


@pytest.mark.parametrize("kind", [Rehearsal, ERACE, DER, DERPlusPlus, AGEM])
def test_while_the_buffer_is_empty_only_new_samples_count(kind: type[RehearsalStrategy]) -> None:
    step = step_of(kind, 5, 0, 1)
    buffer: Any = ScriptedBuffer([], kind.num_draws)
    strategy = kind(buffer, **OPTIONS[kind])
    strategy.begin_task(0, (0, 1, 2, 3, 4, 5))
    network = model()
    loss = strategy.backward(network, step.images, step.labels)
    plain = nn.functional.cross_entropy(model()(step.images), step.labels)
    torch.testing.assert_close(loss, plain.detach())


def test_rehearsal_by_task_weighs_new_and_past() -> None:
    step = step_of(Rehearsal, 6, 3, 4)
    buffer: Any = ScriptedBuffer(step.draws)
    strategy = Rehearsal(buffer, loss_weights="by-task")
    strategy.begin_task(3)  # the fourth
    loss = strategy.loss(model(), step.images, step.labels)
    new = nn.functional.cross_entropy(model()(step.images), step.labels)
    past = nn.functional.cross_entropy(model()(step.draws[0][0]), step.draws[0][1])
    torch.testing.assert_close(loss, new / 4 + past * 3 / 4)


def test_a_gem_takes_out_what_points_against_the_past() -> None:
    gradient, past = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.0, 2.0]])
    missing: list[Tensor | None] = [None]
    gradients = [gradient.clone(), *missing]
    project(gradients, [past, *missing])
    assert gradients[0].tolist() == [[3.0, 0.0]]
    gradients = [-gradient]
    project(gradients, [past])  # does not point against it
    assert gradients[0].tolist() == [[-3.0, 1.0]]
    project([None], [None])
    tiny = [-gradient]
    project(tiny, [torch.tensor([[1e-25, 0.0]])])  # its square is zero
    assert tiny[0].tolist() == [[-3.0, 1.0]]


def test_a_gem_takes_no_step_where_the_gradient_of_the_past_has_overflowed() -> None:
    for past in ([torch.inf, -3.0], [torch.inf, -torch.inf], [torch.nan, 0.0]):
        gradients: list[Tensor | None] = [torch.tensor([1.0, 2.0])]
        project(gradients, [torch.tensor(past)])
        assert gradients[0] is not None
        assert gradients[0].isnan().all()  # so that a GradScaler skips the step


def test_a_gem_step_does_not_raise_the_loss_on_the_past() -> None:
    for seed in range(20):
        step = step_of(AGEM, 5, 4, seed)
        network = model()
        own = gradients(AGEM, network, step, None)
        images, labels = step.draws[0]
        past = nn.functional.cross_entropy(network(images), labels)
        reference = torch.autograd.grad(past, list(network.parameters()))
        along = sum((a * b).sum() for a, b in zip(own, reference, strict=True))
        assert along > -1e-12


def test_gdumb_learns_from_draws_alone() -> None:
    step = step_of(GDumb, 5, 4, 2)
    buffer: Any = ScriptedBuffer(step.draws)
    strategy = GDumb(buffer)
    strategy.observe(model(), step.images, step.labels)
    assert torch.equal(buffer.offered[0], step.images)
    loss = strategy.backward(model(), step.images, step.labels)
    assert len(buffer.offered[0]) == 0
    images, labels = step.draws[0]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model()(images), labels).detach())
    empty: Any = ScriptedBuffer([])
    with pytest.raises(RuntimeError, match="GDumb: the buffer is empty: let it observe a task"):
        GDumb(empty).loss(model(), step.images, step.labels)


def test_er_ace_needs_classes() -> None:
    buffer: Any = ScriptedBuffer([])
    with pytest.raises(ValueError, match="ER-ACE: begin_task needs the classes"):
        ERACE(buffer).begin_task(0)


def test_which_tasks_are_trained_on() -> None:
    tasks = ["a", "b", "c"]
    seen = [
        ["".join(kind().training_tasks(tasks, number)) for number in range(3)]
        for kind in (Incremental, FromScratch, Joint)
    ]
    assert seen == [["a", "b", "c"], ["a", "ab", "abc"], ["", "", "abc"]]
    assert FromScratch.restarts
    assert GDumb.restarts
    assert not Incremental.restarts


def test_what_a_rank_keeps_of_an_uneven_draw_is_random_and_adds_up() -> None:
    sizes = [GlobalSizes(rank, 4, 10, 10) for rank in range(4)]
    assert [each.own_past(3) for each in sizes] == [3, 3, 2, 2]
    assert [each.global_past(3) for each in sizes] == [10] * 4
    assert [each.own_past(1) for each in sizes] == [1] * 4
    assert sizes[0].global_past(1) == 4
    for num_past, num_drawn in ((10, 2), (12, 3), (12, 2), (4, 1), (7, 0)):
        everyone = [GlobalSizes(rank, 4, 10, num_past) for rank in range(4)]
        kept = sum(each.own_past(num_drawn) for each in everyone)
        assert everyone[0].global_past(num_drawn) == kept
    counts = np.zeros(3)
    buffer: Any = ScriptedBuffer([(torch.arange(3.0), torch.arange(3))])
    strategy = Rehearsal(buffer, sizes=sizes[3])
    for _ in range(600):
        kept = strategy.draw()[0].labels
        assert len(kept) == 2
        counts[kept.numpy()] += 1
    assert np.all(np.abs(counts - 400) < 60)
    with pytest.raises(ValueError, match="num_past=3: it must be at least num_ranks=4"):
        GlobalSizes(0, 4, 10, 3)


def batches(num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        labels = torch.randint(6, (8,), generator=generator)
        images = (
            torch.randn(8, 4, generator=generator) + 2 * nn.functional.one_hot(labels, 6)[:, :4]
        )
        yield images, labels


@pytest.mark.parametrize("name", ["rehearsal", "er-ace", "der", "der++", "a-gem"])
def test_in_a_loop_of_ones_own(name: str) -> None:
    """With a real buffer, as the documentation shows it."""
    kind: Any = strategy_named(name)
    options = {key: value for key, value in OPTIONS[kind].items() if key != "logits_dtype"}
    torch.manual_seed(0)
    network = nn.Linear(4, 6)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.3)
    buffer = RehearsalBuffer(50, num_representatives=4, num_draws=kind.num_draws)
    strategy = kind(buffer, **options)
    strategy.begin_task(0, range(6))
    losses = []
    for images, labels in batches(120):
        optimiser.zero_grad()
        losses.append(float(strategy.backward(network, images, labels)))
        optimiser.step()
    strategy.close()
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("name", ["rehearsal", "er-ace", "der", "der++", "a-gem", "gdumb"])
def test_after_a_step_that_failed_the_next_ones_go_on(name: str) -> None:
    kind: Any = strategy_named(name)
    torch.manual_seed(0)
    network = nn.Linear(4, 6)

    def no_memory(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    options = {key: value for key, value in OPTIONS[kind].items() if key != "logits_dtype"}
    buffer = RehearsalBuffer(50, num_representatives=4, num_draws=kind.num_draws)
    strategy = kind(buffer, **options)
    strategy.begin_task(0, range(6))
    for step, (images, labels) in enumerate(batches(12)):
        if kind is GDumb and step < 2:
            strategy.observe(network, images, labels)
        elif step in (3, 4, 8):
            with pytest.raises(torch.OutOfMemoryError):
                strategy.backward(no_memory, images, labels)
        elif step == 6 and kind is not GDumb:  # which is given no new samples
            with pytest.raises((ValueError, IndexError)):
                strategy.backward(network, images, labels.where(labels > 2, -5))
        else:
            strategy.backward(network, images, labels)
            assert buffer.num_past == (4 * kind.num_draws if step else 0)
    assert len(buffer) >= 12
    strategy.close()


@pytest.mark.parametrize("name", ["rehearsal", "er-ace", "der", "der++", "a-gem"])
def test_a_rank_whose_step_failed_alone_stays_in_step(name: str) -> None:
    kind: Any = strategy_named(name)
    options = {key: value for key, value in OPTIONS[kind].items() if key != "logits_dtype"}

    def no_memory(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def rank_main(end: Transport) -> int:
        network = nn.Linear(4, 6)
        buffer = RehearsalBuffer(
            50, num_representatives=4, num_draws=kind.num_draws, transport=end, timeout_seconds=20.0
        )
        with kind(buffer, **options) as strategy:
            strategy.begin_task(0, range(6))
            for step, (images, labels) in enumerate(batches(10)):
                if end.rank == 1 and step in (3, 7):
                    with pytest.raises(torch.OutOfMemoryError):
                        strategy.backward(no_memory, images, labels)
                elif end.rank == 1 and step == 5:
                    with pytest.raises((ValueError, IndexError)):
                        strategy.backward(network, images, labels.where(labels > 2, -5))
                else:
                    strategy.backward(network, images, labels)
            buffer.state_dict(whole=True)  # all ranks must be in step
            return buffer.stats().num_rounds

    assert run_ranks(LocalTransport.connect(2), rank_main) == [10, 10]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Rehearsal, {"loss_weights": "by-task"}),
        (ERACE, {}),
        (SoftTargets, {"weight": 1.0, "num_classes": 6}),
    ],
)
def test_a_loss_that_looks_at_tasks_wants_to_be_told_of_them(
    kind: type[RehearsalStrategy], options: dict[str, Any]
) -> None:
    (images, labels), network = next(batches(1)), nn.Linear(4, 6)
    with RehearsalBuffer(50, num_representatives=4) as buffer:
        strategy = kind(buffer, **options)
        message = rf"{kind.__name__}: no task has begun.* call strategy.begin_task\(number, classes"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                strategy.backward(network, images, labels)
        if kind is SoftTargets:
            with pytest.raises(RuntimeError, match=message):
                strategy.end_task(network)
        strategy.begin_task(0, range(6))
        strategy.backward(network, images, labels)
        assert len(buffer) == 8


def test_er_ace_refuses_classes_that_no_task_has_named() -> None:
    (images, labels), network = next(batches(1)), nn.Linear(4, 6)
    message = r"no task has named the class\(es\) \[4, 5\]: call strategy.begin_task.* every task"
    with RehearsalBuffer(50, num_representatives=8) as buffer:
        strategy = ERACE(buffer)
        strategy.begin_task(1, (0, 1, 2, 3))
        for new in (labels % 4 + 2, labels % 4):  # then there are past ones, as after a load
            with pytest.raises(ValueError, match=message):
                strategy.backward(network, images, new)
        blurry = ERACE(buffer, is_blurry=True)
        blurry.begin_task(0, (0, 1))
        blurry.backward(network, images, labels)


@pytest.mark.accelerator
def test_er_ace_looks_at_labels_on_a_device_once_per_task(accelerator: str) -> None:
    (images, labels), network = next(batches(1)), nn.Linear(4, 6).to(accelerator)
    images, labels = images.to(accelerator), labels.to(accelerator)
    with RehearsalBuffer(50, num_representatives=4) as buffer:
        strategy = ERACE(buffer)
        strategy.begin_task(0, (0, 1, 2))
        strategy.loss(network, images, labels % 3)
        strategy.loss(network, images, labels)  # not looked at
        strategy.begin_task(1, (3,))
        with pytest.raises(ValueError, match=r"no task has named the class\(es\) \[4, 5\]"):
            strategy.loss(network, images, labels)


def test_loss_weights_that_there_are_not() -> None:
    with (
        RehearsalBuffer(50, num_representatives=4) as buffer,
        pytest.raises(ValueError, match="loss_weights='by_task': there are by-sample, by-task"),
    ):
        Rehearsal(buffer, loss_weights="by_task")


def test_half_precision_logits_are_stored_as_such() -> None:
    buffer = RehearsalBuffer(20, num_representatives=2)
    strategy = DER(buffer, alpha=0.5, logits_dtype=torch.float16)
    for images, labels in batches(3):
        strategy.backward(nn.Linear(4, 6), images, labels)
    drawn = strategy.draw()[0].logits
    assert drawn is not None
    assert drawn.dtype == torch.float16
    strategy.close()


def test_a_buffer_with_another_number_of_draws() -> None:
    with (
        RehearsalBuffer(20, num_representatives=2) as buffer,
        pytest.raises(ValueError, match="DERPlusPlus needs a buffer with num_draws=2, not 1"),
    ):
        DERPlusPlus(buffer, alpha=0.5, beta=0.5)


def test_er_ace_never_leaves_out_a_samples_own_class() -> None:
    """As where borders are blurred, and a class of an earlier task comes again."""
    buffer: Any = ScriptedBuffer([])
    strategy = ERACE(buffer)
    strategy.begin_task(0, (0, 1))
    strategy.begin_task(1, (2, 3))
    step = step_of(ERACE, 6, 0, 1)
    loss = strategy.loss(model(), step.images, torch.tensor([0, 1, 2, 3, 0, 2]))
    assert 0 < float(loss.detach()) < 10


def test_unknown_strategies() -> None:
    with pytest.raises(ValueError, match="strategy='magic': there are incremental, rehearsal"):
        strategy_named("magic")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_made_from_a_recipe(name: str) -> None:
    recipe = recipe_named("digits", strategy=name, alpha=0.25, beta=0.75)
    strategy = strategy_of(recipe, 0, 1, num_train_samples=1000, num_classes=10)
    assert type(strategy) is STRATEGIES[name]
    assert (strategy.stats() is not None) == strategy.rehearses
    bounds = ("incremental", "from-scratch", "joint", "class-means", "ridge")
    draws_nothing = name in (*bounds, "si", "fedssi", "adapter")
    assert strategy.num_draws == (0 if draws_nothing else 2 if name == "der++" else 1)
    if isinstance(strategy, DERPlusPlus):
        assert (strategy.alpha, strategy.beta) == (0.25, 0.75)
    strategy.close()


def test_a_copy_of_the_model_is_left_alone() -> None:
    """A strategy changes gradients, never weights."""
    step = step_of(DERPlusPlus, 5, 4, 2)
    network = model()
    before = copy.deepcopy(network.state_dict())
    gradients(DERPlusPlus, network, step, None)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not dist.is_initialized()


def test_what_each_strategy_keeps_and_sends() -> None:
    """Beside the model: records, and copies of its weights."""
    found = {}
    num_weights = sum(each.numel() for each in model().parameters())
    for name in ("incremental", "rehearsal", "der", "a-gem", "si", "si-rehearsal", "joint"):
        recipe = recipe_named(
            "digits", strategy=name, capacity=100, global_batch_size=16,
            global_num_representatives=4,
        )  # fmt: skip
        learner = model().float()
        with strategy_of(recipe, 0, 1, num_train_samples=500, num_classes=6) as strategy:
            strategy.begin_task(0, range(6))
            for images, labels in batches(3):
                strategy.backward(learner, images, labels)
                strategy.end_step(learner)
            found[name] = strategy.costs(learner)
            assert found[name]["sent_bytes_per_step"] == 0
            if name == "a-gem":
                strategy.sizes = GlobalSizes(0, 2, 16, 4)
                assert strategy.costs(learner)["sent_bytes_per_step"] == 4 * num_weights
    held = {name: costs["held_bytes"] for name, costs in found.items()}
    assert held["incremental"] == held["joint"] == 0
    assert held["rehearsal"] == held["a-gem"] == 100 * 32  # 24, in whole 16 bytes
    assert held["der"] == 100 * (24 + 6 * 4)
    assert held["si"] == 4 * 4 * num_weights  # anchor, importance, what was done, and before
    assert held["si-rehearsal"] == held["si"] + held["rehearsal"]
