"""GRASP: its law, over unequal shards, and what it remembers.

Statistical tests have fixed seeds and a false-alarm rate of 0.001.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from labelled_contents import LABELS, ROWS, draws, labelled_contents

from ritornello.policies.grasp import GraspSampling
from ritornello.rounds.planner import draw_all
from ritornello.rounds.random_streams import Purpose, Streams
from ritornello.testing import chi_square_p_value

PLACES = np.arange(sum(ROWS))[labelled_contents().used_places]


def bound(distances: np.ndarray | None = None) -> GraspSampling:
    """The policy of a buffer; distances by global index."""
    policy = GraspSampling()
    policy.bind(sum(ROWS))
    if distances is not None:
        policy.measured(PLACES[: len(distances)], distances)
    return policy


def distances_of(policy: GraspSampling) -> np.ndarray:
    """By global index."""
    distances: np.ndarray = policy.state()["distances"][PLACES]
    return distances


def test_classes_take_turns_over_steps_and_ranks() -> None:
    turns = np.concatenate([LABELS[drawn.ravel()] for drawn in draws(GraspSampling(), 4, 10)])
    assert turns.tolist() == np.tile([3, 5, 8], 40).tolist()


def test_draws_are_in_proportion_to_closeness() -> None:
    distances = np.random.default_rng(0).permutation(np.linspace(0.1, 0.9, len(LABELS)))
    counts = np.zeros(len(LABELS))
    num_runs, held = 4000, labelled_contents()
    for run in range(num_runs):
        policy = bound(distances)
        generator = Streams(run, Purpose.SAMPLING).at(0)
        first = draw_all(held, 1, 1, policy, generator)[0].ravel()
        counts[first] += 1
        # What was drawn is now as far as it was, and the farthest of its class, together.
        for index in first:
            farthest = distances[LABELS[index] == LABELS].max()
            assert distances_of(policy)[index] == pytest.approx(distances[index] + farthest)
    for label in (3, 5, 8):
        members = label == LABELS
        chances = 1 / (distances[members] + 1e-7)
        expected = num_runs * chances / chances.sum()
        assert chi_square_p_value(counts[members], expected) > 0.001
        assert chi_square_p_value(counts[members], expected.mean()) < 1e-9


def test_draws_run_from_prototypes_to_the_atypical() -> None:
    distances = np.where(np.arange(len(LABELS)) % 2, 0.001, 0.9)
    held, policy, streams = labelled_contents(), bound(distances), Streams(0, Purpose.SAMPLING)
    joint = [draw_all(held, 3, 1, policy, streams.at(step))[0].ravel() for step in range(8)]
    drawn = distances[np.concatenate(joint)]
    assert (drawn[:12] == 0.001).mean() > 0.9  # 4 of each class; the smallest has 4 prototypes
    assert (drawn[60:] == 0.001).mean() < 0.7


def test_draws_without_distances_are_uniform_inside_classes() -> None:
    held, streams = labelled_contents(), Streams(1, Purpose.SAMPLING)
    counts = np.zeros(len(LABELS))
    for step in range(3000):
        counts[draw_all(held, 1, 1, bound(), streams.at(step))[0].ravel()] += 1
    for label in (3, 5, 8):
        members = counts[label == LABELS]
        assert chi_square_p_value(members, 3000 / len(members)) > 0.001


def test_new_ones_have_the_mean_distance_of_their_class() -> None:
    held, policy = labelled_contents(), bound(np.linspace(0.2, 0.4, 30))  # 30 of the 40 of class 3
    draw_all(held, 1, 1, policy, np.random.default_rng(0))
    measured = policy.state()["distances"][held.places(3)]
    assert not np.isnan(measured).any()
    assert np.count_nonzero(np.isclose(measured, 0.3)) >= 9


def test_what_was_overwritten_has_no_distance() -> None:
    policy = bound(np.linspace(0.1, 0.9, len(LABELS)))
    policy.overwritten(PLACES[[1, 5, 1]])
    assert np.flatnonzero(np.isnan(distances_of(policy))).tolist() == [1, 5]


def test_it_goes_on_for_ever_without_a_new_measurement() -> None:
    """Distances double each time round; they must not overflow."""
    held, streams = labelled_contents(), Streams(0, Purpose.SAMPLING)
    policy = bound(np.linspace(0.1, 0.9, len(LABELS)))
    counts = np.zeros(len(LABELS))
    for step in range(1500):  # 7 draws in each of three turns: 1,300 times through class 5
        counts[draw_all(held, 7, 1, policy, streams.at(step))[0].ravel()] += 1
    assert np.isfinite(distances_of(policy)).all()
    fives = counts[LABELS == 5]
    assert fives.min() > 0.9 * fives.mean()


def test_it_goes_on_from_its_state() -> None:
    held, policy, streams = labelled_contents(), bound(), Streams(2, Purpose.SAMPLING)
    policy.measured(PLACES, np.linspace(0.1, 0.9, len(LABELS)))
    draw_all(held, 7, 1, policy, streams.at(0))
    again = bound()
    again.restore(policy.state())
    for step in range(1, 5):
        ours, theirs = (draw_all(held, 7, 1, each, streams.at(step)) for each in (policy, again))
        assert np.array_equal(ours, theirs)


def test_distances_go_where_their_representatives_go() -> None:
    policy = bound(np.linspace(0.1, 0.9, len(LABELS)))
    draw_all(labelled_contents(), 7, 1, policy, np.random.default_rng(0))
    state, found = policy.state(), distances_of(policy)
    before, after = PLACES[[3, 50, 7]], np.array([0, 2, 9])
    other = GraspSampling()
    other.bind(10)
    other.adopt(state, before, after)
    moved = other.state()
    assert moved["distances"][after].tolist() == found[[3, 50, 7]].tolist()
    assert np.isnan(np.delete(moved["distances"], after)).all()
    assert moved["turns"].tolist() == [0]
    left = GraspSampling().forget(state, before, after)
    assert left["distances"][after].tolist() == found[[3, 50, 7]].tolist()
    assert np.isnan(np.delete(left["distances"], after)).all()
    assert left["turns"].tolist() == state["turns"].tolist() != [0]
    other.bind(10)
    other.adopt({"turn": np.array([3])}, before, after)  # of another policy
    assert np.isnan(other.state()["distances"]).all()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("distances", np.zeros(94), "distances must be 95, as many as there is room"),
        ("distances", np.zeros(95, np.int64), "distances are int64: they must be float64"),
        ("distances", np.full(95, -0.5), "distances must be at least 0, or not measured"),
        ("distances", np.full(95, np.inf), "distances must be at least 0, or not measured"),
        ("turns", np.array([-1]), "turns must be one number, at least 0"),
        ("turns", np.array([1.0]), "turns must be one number, at least 0"),
        ("turns", np.array([1, 2]), "turns must be one number, at least 0"),
    ],
)
def test_a_state_that_cannot_be(name: str, array: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bound().restore({**bound().state(), name: array})
