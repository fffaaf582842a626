"""Drawing of earlier tasks alone: its law, over unequal shards, and what it remembers.

Statistical tests have fixed seeds and a false-alarm rate of 0.001.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_contents import LABELS, ROWS, labelled_contents

from ritornello import CheckpointError, EarlierTasks, RehearsalBuffer, rehearse
from ritornello.rounds.planner import draw_all
from ritornello.rounds.random_streams import Purpose, Streams
from ritornello.testing import check_consistent, chi_square_p_value, run_ranks
from ritornello.transports import LocalTransport, Transport

PLACES = np.arange(sum(ROWS))[labelled_contents().used_places]


def begun(*running: int) -> EarlierTasks:
    """The policy of a buffer in whose running task some representatives came, by global index."""
    policy = EarlierTasks()
    policy.bind(sum(ROWS))
    policy.begin_task(labelled_contents())
    policy.overwritten(PLACES[list(running)])
    return policy


def test_those_of_earlier_tasks_are_equally_likely_on_every_rank() -> None:
    running = [0, 5, 29, 30, 71, *range(40, 55)]
    held, policy, streams = labelled_contents(), begun(*running), Streams(4, Purpose.SAMPLING)
    counts = np.zeros((3, len(LABELS)))
    for step in range(4000):
        (drawn,) = draw_all(held, 5, 1, policy, streams.at(step))
        assert len(np.unique(drawn)) == drawn.size
        for of_rank, indices in zip(counts, drawn, strict=True):
            of_rank[indices] += 1
    assert not counts[:, running].any()
    earlier = np.delete(counts, running, axis=1)
    expected = 4000 * 5 / earlier.shape[1]
    for of_rank in earlier:
        assert chi_square_p_value(of_rank, expected) > 0.001
    assert chi_square_p_value(earlier.sum(axis=0), 3 * expected) > 0.001


@pytest.mark.parametrize("num_earlier", [0, 1, 4, 7])
def test_while_there_are_fewer_than_are_asked_for(num_earlier: int) -> None:
    held, policy = labelled_contents(), begun(*range(num_earlier, len(LABELS)))
    (drawn,) = draw_all(held, 6, 1, policy, np.random.default_rng(0))
    assert drawn.shape == (3, min(6, num_earlier))
    for of_rank in drawn:
        assert len(set(of_rank)) == len(of_rank)
    assert set(drawn.ravel()) <= set(range(num_earlier))


def test_nothing_is_drawn_before_a_task_has_begun() -> None:
    policy = EarlierTasks()
    policy.bind(sum(ROWS))
    policy.overwritten(PLACES)
    assert draw_all(labelled_contents(), 6, 2, policy, np.random.default_rng(0)).size == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.none(), st.lists(st.integers(0, len(LABELS) - 1), max_size=30))))
def test_what_was_overwritten_is_of_the_running_task(happens: list[list[int] | None]) -> None:
    """None: a task begins; else places are written, some of them twice."""
    held, policy, earlier = labelled_contents(), begun(), set(range(len(LABELS)))
    for indices in happens:
        if indices is None:
            policy.begin_task(held)
            earlier = set(range(len(LABELS)))
        else:
            policy.overwritten(PLACES[indices])
            earlier -= set(indices)
        assert policy.num_drawable(held) == len(earlier)
        (drawn,) = draw_all(held, len(LABELS), 1, policy, np.random.default_rng(0))
        for of_rank in drawn:
            assert sorted(of_rank) == sorted(earlier)


# What it remembers.


def test_it_goes_on_from_its_state() -> None:
    held, policy, streams = labelled_contents(), begun(3, 70, 12, 3), Streams(2, Purpose.SAMPLING)
    again = EarlierTasks()
    again.bind(sum(ROWS))
    again.restore(policy.state())
    for step in range(5):
        for each in (policy, again):
            each.overwritten(PLACES[[step, 40 + step]])
        ours, theirs = (draw_all(held, 7, 1, each, streams.at(step)) for each in (policy, again))
        assert np.array_equal(ours, theirs)


def test_tasks_stay_with_their_representatives() -> None:
    state = begun(50).state()
    before, after = PLACES[[7, 50, 3]], np.array([0, 2, 9])
    other = EarlierTasks()
    other.bind(10)
    other.adopt(state, before, after)
    assert sorted(other.state()["earlier"].tolist()) == [0, 9]
    assert sorted(EarlierTasks().forget(state, before, after)["earlier"].tolist()) == [0, 9]
    nothing = np.zeros(0, dtype=np.int64)
    assert EarlierTasks().forget(state, nothing, nothing)["earlier"].tolist() == []
    of_another_policy = EarlierTasks()
    of_another_policy.bind(10)
    of_another_policy.adopt({"turns": np.array([3])}, before, after)
    assert of_another_policy.state()["earlier"].tolist() == []


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        (np.array([1.0]), "earlier must be places, none of them twice"),
        (np.array([4, 7, 4]), "earlier must be places, none of them twice"),
        (np.array([-1]), "earlier must be places from 0 to 94"),
        (np.array([95]), "earlier must be places from 0 to 94"),
    ],
)
def test_a_state_that_cannot_be(earlier: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        begun().restore({"earlier": earlier})


# In a buffer.


def batch_of(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = (step * 8 + rank) * 8 + torch.arange(8)
    return numbers, numbers % 5


def drawn_by(end: Transport, steps_per_task: int = 20, num_tasks: int = 4) -> list[list[int]]:
    """What each step drew: the steps in which it was offered, also while shards fill."""
    found = []
    with RehearsalBuffer(
        60 * end.num_ranks, num_representatives=6, sampling="earlier-tasks", transport=end
    ) as buffer:
        for step in range(num_tasks * steps_per_task):
            if step % steps_per_task == 0:
                buffer.begin_task(str(step // steps_per_task))
            numbers, _ = buffer.update(batch_of(step, end.rank))
            found.append([int(number) // 64 for number in numbers[8:]])
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_drawn_is_of_earlier_tasks(num_ranks: int) -> None:
    everyone = run_ranks(LocalTransport.connect(num_ranks, 30.0), drawn_by)
    for found in everyone:
        for step, offered_in in enumerate(found):
            # What comes with the first step of a task was drawn before it began.
            running = max(0, step - 1) // 20
            assert len(offered_in) == (6 if running else 0)
            assert all(each // 20 < running for each in offered_in)
    last = [each // 20 for found in everyone for offered_in in found[61:] for each in offered_in]
    assert set(last) == {0, 1, 2}
    assert everyone == run_ranks(LocalTransport.connect(num_ranks, 30.0), drawn_by)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_samples_need_no_label(num_ranks: int) -> None:
    """Only when they were admitted counts: with labels and without, the same is drawn."""

    def drawn_with(label: int | None, sign: int) -> list[Any]:
        def rank_main(end: Transport) -> list[Any]:
            found = []
            with RehearsalBuffer(
                60 * num_ranks,
                num_representatives=6,
                selection="reservoir",
                label=label,
                sampling="earlier-tasks",
                transport=end,
            ) as buffer:
                for step in range(60):
                    if step % 20 == 0:
                        buffer.begin_task(str(step // 20))
                    numbers, targets = batch_of(step, end.rank)
                    found.append(buffer.update((numbers, sign * targets))[0].tolist())
                check_consistent(buffer)
            return found

        return run_ranks(LocalTransport.connect(num_ranks, 30.0), rank_main)

    with_labels = drawn_with(label=1, sign=1)
    assert all(len(numbers) == 8 + 6 for found in with_labels for numbers in found[21:])
    assert drawn_with(label=None, sign=1) == with_labels
    assert drawn_with(label=1, sign=-1) == with_labels  # targets that could be no classes


@pytest.mark.parametrize("call", ["update", "draw", "rehearse"])
def test_without_a_task_it_does_not_go_on_in_silence(call: str) -> None:
    def rank_main(end: Transport) -> None:
        with RehearsalBuffer(
            60,
            num_representatives=0,
            most_representatives=6,
            sampling="earlier-tasks",
            transport=end,
        ) as buffer:
            for step in range(4):  # no task needs to be known as long as nothing is to be drawn
                buffer.update(batch_of(step, end.rank))
            buffer.num_representatives = 6
            buffer.update(batch_of(4, end.rank))
            for _ in range(2):
                with pytest.raises(
                    RuntimeError, match=rf"{call}: EarlierTasks .* call buffer.begin_task\(name\)"
                ):
                    if call == "rehearse":
                        next(rehearse([batch_of(5, end.rank)], buffer))
                    elif call == "draw":
                        buffer.draw()
                    else:
                        buffer.update(batch_of(5, end.rank))
            buffer.begin_task("new")
            buffer.update(batch_of(5, end.rank))
            state = buffer.state_dict(whole=True)
            assert len(buffer.update(batch_of(6, end.rank))[0]) == 8 + 6
            if end.num_ranks == 1:
                buffer.load_state_dict(state)  # it knows that a task has begun
                assert len(buffer.update(batch_of(6, end.rank))[0]) == 8 + 6

    for num_ranks in (1, 2):
        run_ranks(LocalTransport.connect(num_ranks, 30.0), rank_main)


def test_ranks_that_begin_a_task_after_unequally_many_updates() -> None:
    def rank_main(end: Transport) -> None:
        with RehearsalBuffer(
            60, num_representatives=6, sampling="earlier-tasks", transport=end
        ) as buffer:
            buffer.update(batch_of(0, end.rank))
            if end.rank == 0:
                buffer.draw()
            with pytest.raises(CheckpointError, match="have called .*begin_task.* all must make"):
                buffer.begin_task("new")
            assert buffer.tasks == ()

    run_ranks(LocalTransport.connect(2, 10.0), rank_main)
