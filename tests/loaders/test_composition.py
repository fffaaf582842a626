"""How many samples of a step are new, and which. Statistical tests have fixed seeds and a
false-alarm rate of 0.001."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, TensorDataset

from ritornello import ComposedSteps, share_of_new
from ritornello.testing import chi_square_p_value


def on_all_ranks(num_ranks: int, num_new: int, num_before: int, **settings: Any) -> list[Any]:
    """Every rank's steps of all epochs: ``[rank][epoch][step]``."""
    everyone = [
        ComposedSteps(num_new, num_before, rank=rank, num_ranks=num_ranks, **settings)
        for rank in range(num_ranks)
    ]
    return [[list(steps) for _ in range(steps.num_epochs)] for steps in everyone]


@st.composite
def compositions(draw: st.DrawFn) -> dict[str, Any]:
    num_ranks = draw(st.integers(1, 4))
    return {
        "num_ranks": num_ranks,
        "num_new": draw(st.integers(num_ranks, 200)),
        "num_before": draw(st.one_of(st.just(0), st.integers(1, 2000))),
        "samples_per_step": draw(st.integers(1, 30)),
        "batch_size": draw(st.one_of(st.none(), st.integers(1, 30))),
        "num_epochs": draw(st.integers(1, 4)),
        "first_share": draw(st.one_of(st.none(), st.floats(0.01, 1.0))),
        "floor": draw(st.floats(0.0, 1.0)),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }


# The share.


def test_the_share_falls_from_the_first_to_that_of_training_from_scratch() -> None:
    shares = [share_of_new(100, 300, progress, 0.75) for progress in (0.0, 0.5, 1.0)]
    assert shares == [0.75, 0.5, 0.25]
    assert share_of_new(100, 300, 0.3) == 0.25  # from scratch's throughout
    assert share_of_new(100, 300, 0.3, first_share=0.1) == 0.25  # never rises
    assert share_of_new(10, 990, 1.0, floor=0.2) == 0.2
    assert share_of_new(10, 0, 0.7, first_share=0.5) == 1.0  # nothing came before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_new": 0}, "num_new=0: it must be at least 1"),
        ({"num_before": -1}, "num_before=-1: it must be at least 0"),
        ({"progress": 1.5}, "progress=1.5: it must be from 0 to 1"),
        ({"progress": float("nan")}, "progress=nan: it must be from 0 to 1"),
        ({"first_share": 0.0}, "first_share=0.0: it must be above 0 and at most 1"),
        ({"first_share": 1.1}, "first_share=1.1: it must be above 0 and at most 1"),
        ({"floor": -0.1}, "floor=-0.1: it must be from 0 to 1"),
        ({"floor": 2}, "floor=2: it must be from 0 to 1"),
    ],
)
def test_a_share_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_of_new(**{"num_new": 10, "num_before": 30, "progress": 0.5, **arguments})


# The counts.


@settings(deadline=None, max_examples=200)
@given(compositions())
def test_the_running_share_is_exact_to_within_one_sample(composition: dict[str, Any]) -> None:
    steps = ComposedSteps(rank=0, **composition)
    num_all, num_per_step = len(steps) * steps.num_epochs, composition["samples_per_step"]
    wanted = [
        share_of_new(
            composition["num_new"],
            composition["num_before"],
            number / max(1, num_all - 1),
            composition["first_share"],
            composition["floor"],
        )
        for number in range(num_all)
    ]
    found = []
    for _ in range(steps.num_epochs):
        for step, positions in enumerate(steps):
            assert 1 <= len(positions) <= num_per_step
            assert steps.num_past(step) == num_per_step - len(positions)
            found.append(len(positions))
    exact = np.maximum(1.0, np.array(wanted) * num_per_step)
    assert np.all(np.abs(np.cumsum(found) - exact.cumsum()) < 1.0)
    assert np.all(np.abs(found - exact) < 1.0 + 1e-9)


@settings(deadline=None, max_examples=200)
@given(compositions())
def test_each_new_sample_comes_equally_often_and_never_twice_in_a_step(
    composition: dict[str, Any],
) -> None:
    everyone = on_all_ranks(**composition)
    num_new = composition["num_new"]
    times: Counter[int] = Counter()
    for epochs in zip(*everyone, strict=True):
        for parts in zip(*epochs, strict=True):
            assert len({len(part) for part in parts}) == 1  # the same on all ranks
            joint = [position for part in parts for position in part]
            times.update(joint)
            if len(joint) <= num_new:
                assert len(set(joint)) == len(joint)
            else:
                assert len(set(joint)) == num_new
    assert all(0 <= position < num_new for position in times)
    counts = [times[position] for position in range(num_new)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("batch_size", [None, 16, 64])
def test_there_are_as_many_steps_as_in_incremental_training(batch_size: int | None) -> None:
    steps = ComposedSteps(1000, 0, samples_per_step=32, batch_size=batch_size, rank=1, num_ranks=3)
    assert len(steps) == 1000 // (3 * (batch_size or 32))
    assert len(list(steps)) == len(steps)
    assert len(ComposedSteps(10, 0, samples_per_step=32)) == 1


def test_nothing_is_past_where_nothing_came_before() -> None:
    steps = ComposedSteps(100, 0, samples_per_step=9, batch_size=8, first_share=0.5)
    assert {len(positions) for positions in steps} == {9}
    assert steps.num_past(3) == 0


def test_one_sample_is_new_in_a_step_however_long_the_stream() -> None:
    steps = ComposedSteps(100, 10**6, samples_per_step=8)
    assert {len(positions) for positions in steps} == {1}
    assert len(next(iter(ComposedSteps(100, 10**6, samples_per_step=8, floor=0.5)))) == 4


# The order.


def test_every_order_is_equally_likely() -> None:
    """Of four samples in steps of three, in two epochs: which comes first, and which in the
    second step beside the one that was left."""
    num_runs, first, beside = 4000, np.zeros(4), np.zeros(3)
    for seed in range(num_runs):
        steps = ComposedSteps(4, 0, samples_per_step=3, num_epochs=2, seed=seed)
        (one,), (two,) = list(steps), list(steps)
        first[one[0]] += 1
        assert two[0] not in one
        beside[one.index(two[1])] += 1
    assert chi_square_p_value(first, num_runs / 4) > 0.001
    assert chi_square_p_value(beside, num_runs / 3) > 0.001


def test_ranks_share_the_new_samples_at_random() -> None:
    """Which of two ranks gets which sample in the first step says nothing about the sample."""
    counts = np.zeros((2, 12))
    for seed in range(3000):
        for rank, epochs in enumerate(on_all_ranks(2, 12, 24, samples_per_step=9, seed=seed)):
            counts[rank, epochs[0][0]] += 1
    for of_rank in counts:
        assert chi_square_p_value(of_rank, 3000 * 3 / 12) > 0.001


def test_the_order_follows_from_the_seed_and_what_came_before() -> None:
    def first_epoch(**changed: Any) -> list[list[int]]:
        arguments = {"num_before": 300, "samples_per_step": 10, "seed": 5, **changed}
        return list(ComposedSteps(100, **arguments))

    assert first_epoch() == first_epoch()
    assert first_epoch() != first_epoch(seed=6)
    assert first_epoch(floor=0.25, num_before=301) != first_epoch(floor=0.25)
    assert first_epoch() != sorted(first_epoch())


@settings(deadline=None, max_examples=100)
@given(compositions(), st.data())
def test_any_step_can_be_the_first(composition: dict[str, Any], data: st.DataObject) -> None:
    steps = ComposedSteps(rank=0, **composition)
    whole = [list(steps) for _ in range(steps.num_epochs)]
    epoch = data.draw(st.integers(0, steps.num_epochs - 1))
    first = data.draw(st.integers(0, len(steps)))
    for again in (steps, ComposedSteps(rank=0, **composition)):
        assert list(again.positions(epoch, first)) == whole[epoch][first:]


# Epochs.


def test_each_iteration_is_the_next_epoch() -> None:
    settings: dict[str, Any] = {"samples_per_step": 10, "num_epochs": 3, "first_share": 0.9}
    steps = ComposedSteps(100, 300, **settings)
    epochs = [list(steps) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert epochs == [list(ComposedSteps(100, 300, **settings).positions(e)) for e in range(3)]
    with pytest.raises(ValueError, match=r"epoch 3: there are 3 \(num_epochs\), counted from 0"):
        next(iter(steps))
    steps.set_epoch(1)
    assert steps.num_past(0) == 10 - len(epochs[1][0])  # at once
    assert [list(steps), list(steps)] == epochs[1:]


def test_how_many_are_past_is_known_a_step_ahead() -> None:
    steps = ComposedSteps(100, 300, samples_per_step=10, num_epochs=2, first_share=0.9)
    told = [steps.num_past(0)]  # before the first epoch has begun
    found = []
    for _ in range(2):
        for step, positions in enumerate(steps):
            found.append(10 - len(positions))
            told.append(steps.num_past(step + 1))
    assert told == [*found, found[-1]]  # no step comes after the last one
    assert found[0] < found[-1]


@pytest.mark.parametrize("step", [-1, 11])
def test_there_is_no_such_step(step: int) -> None:
    steps = ComposedSteps(100, 300, samples_per_step=10)
    with pytest.raises(ValueError, match=f"step {step}: it must be from 0 to 10"):
        steps.num_past(step)
    with pytest.raises(ValueError, match=f"step {step}: it must be from 0 to 10"):
        steps.positions(0, step)


@pytest.mark.parametrize("epoch", [-1, 2])
def test_there_is_no_such_epoch(epoch: int) -> None:
    steps = ComposedSteps(100, 300, samples_per_step=10, num_epochs=2)
    with pytest.raises(ValueError, match=f"epoch {epoch}: there are 2"):
        steps.set_epoch(epoch)
    with pytest.raises(ValueError, match="set_epoch says which one is next"):
        steps.positions(epoch)


# Its arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_new": 0}, "num_new=0: it must be at least 1"),
        ({"num_before": -5}, "num_before=-5: it must be at least 0"),
        ({"samples_per_step": 0}, "samples_per_step=0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: it must be at least 1"),
        ({"num_epochs": 0}, "num_epochs=0: it must be at least 1"),
        ({"num_ranks": 0}, "num_ranks=0: it must be at least 1"),
        ({"rank": 2, "num_ranks": 2}, "rank=2: it must be from 0 to 1"),
        ({"rank": 1}, "rank=1: it must be from 0 to 0"),
        ({"seed": 2**64}, f"seed={2**64}: it must be from 0 to {2**64 - 1}"),
        ({"first_share": 7}, "first_share=7: it must be above 0 and at most 1"),
        ({"floor": 7}, "floor=7: it must be from 0 to 1"),
        ({"num_new": 3, "num_ranks": 4}, r"num_new=3: it must be at least the number of ranks \(4"),
    ],
)
def test_arguments_that_break_a_rule(arguments: dict[str, Any], message: str) -> None:
    given = {"num_new": 10, "num_before": 30, "samples_per_step": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        ComposedSteps(**given)


@pytest.mark.parametrize("name", ["num_new", "num_before", "samples_per_step", "num_epochs"])
def test_counts_are_integers(name: str) -> None:
    given = {"num_new": 10, "num_before": 30, "samples_per_step": 4, name: 2.5}
    with pytest.raises(TypeError, match=f"{name}=2.5: it must be an integer"):
        ComposedSteps(**given)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_are_those_of_the_default_group(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        found = list(ComposedSteps(40, 40, samples_per_step=8))
    finally:
        dist.destroy_process_group()
    assert found == on_all_ranks(2, 40, 40, samples_per_step=8)[rank][0]


# In a loader.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_a_loader(num_workers: int) -> None:
    data = TensorDataset(torch.arange(60) * 10)
    settings: dict[str, Any] = {"samples_per_step": 6, "num_epochs": 2, "first_share": 0.8}
    steps = ComposedSteps(60, 120, **settings)
    loader = DataLoader(
        data,
        batch_sampler=steps,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if num_workers else None,
    )
    assert len(loader) == 10
    for epoch in range(2):
        wanted = list(ComposedSteps(60, 120, **settings).positions(epoch))
        found = []
        for step, (values,) in enumerate(loader):
            found.append((values // 10).tolist())
            # Workers load ahead of the loop; what it is told is of its own step.
            assert steps.num_past(step) == 6 - len(values)
        assert found == wanted
    del loader


def test_a_training_goes_on_in_the_middle_of_an_epoch() -> None:
    data = TensorDataset(torch.arange(60))
    steps = ComposedSteps(60, 120, samples_per_step=6, num_epochs=2)
    steps.set_epoch(1)
    rest = DataLoader(data, batch_sampler=list(steps.positions(1, first_step=7)))
    assert [values.tolist() for (values,) in rest] == list(islice(iter(steps), 7, None))
