"""Which rank holds which sample, and what it takes of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.experiments.data.unlike_ranks import batches_of_own, rank_of_samples
from ritornello.testing import chi_square_p_value


def shares(labels: np.ndarray, ranks: np.ndarray, num_ranks: int) -> np.ndarray:
    """[class, rank]"""
    counts = [np.bincount(ranks[labels == each], minlength=num_ranks) for each in np.unique(labels)]
    return np.stack([each / each.sum() for each in counts])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 7),
    st.sampled_from([1e-300, 1e-6, 0.01, 0.1, 1.0, 100.0, 1e6]),
    st.integers(0, 5),
)
def test_every_sample_has_one_rank(
    labels: list[int], num_ranks: int, alpha: float, seed: int
) -> None:
    ranks = rank_of_samples(np.array(labels), num_ranks, alpha, seed)
    assert len(ranks) == len(labels)
    assert ranks.min() >= 0
    assert ranks.max() < num_ranks
    again = rank_of_samples(np.array(labels), num_ranks, alpha, seed)
    assert np.array_equal(ranks, again)


def test_shares_are_those_of_the_dirichlet_distribution() -> None:
    labels = np.repeat(np.arange(400), 1000)
    for alpha in (0.1, 1.0, 10.0):
        found = shares(labels, rank_of_samples(labels, 4, alpha, seed=1), 4)
        # Mean 1 / n and variance (1 / n) (1 - 1 / n) / (n alpha + 1), over 400 classes.
        variance = 0.25 * 0.75 / (4 * alpha + 1)
        assert np.abs(found.mean(axis=0) - 0.25).max() < 4 * np.sqrt(variance / 400)
        assert found.var() == pytest.approx(variance, rel=0.15)
    alike = shares(labels, rank_of_samples(labels, 4, 1e6, seed=1), 4)
    assert np.abs(alike - 0.25).max() < 0.005
    apart = shares(labels, rank_of_samples(labels, 4, 1e-6, seed=1), 4)
    assert apart.max(axis=1).tolist() == [1.0] * 400
    assert chi_square_p_value(apart.sum(axis=0), 100.0) > 0.001


def test_a_class_has_the_same_shares_whatever_else_there_is() -> None:
    labels = np.repeat([0, 1, 2], 300)
    everything = shares(labels, rank_of_samples(labels, 3, 0.5, 7), 3)
    few = np.repeat([2, 0], 300)
    assert np.array_equal(shares(few, rank_of_samples(few, 3, 0.5, 7), 3), everything[[0, 2]])
    other = shares(labels, rank_of_samples(labels, 3, 0.5, 8), 3)
    assert not np.array_equal(other, everything)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 9), st.data())
def test_own_samples_come_pass_after_pass(
    num_own: int, batch_size: int, num_batches: int, data: st.DataObject
) -> None:
    own = 5 + 3 * np.arange(num_own)
    batches = list(batches_of_own(own, batch_size, (0, 1), num_batches=num_batches))
    assert [len(each) for each in batches] == [batch_size] * num_batches
    everything = np.concatenate(batches)
    for start in range(0, len(everything), num_own):
        one_pass = everything[start : start + num_own].tolist()
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(own.tolist())
    first = data.draw(st.integers(0, num_batches))
    rest = batches_of_own(own, batch_size, (0, 1), num_batches=num_batches, first=first)
    assert [each.tolist() for each in rest] == [each.tolist() for each in batches[first:]]


def test_passes_have_orders_of_their_own() -> None:
    first, second = batches_of_own(np.arange(50), 50, (0, 1), num_batches=2)
    [other] = batches_of_own(np.arange(50), 50, (0, 2), num_batches=1)
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
