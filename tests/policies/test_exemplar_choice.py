from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.policies.exemplars import at_random, closest_to_mean, herding
from ritornello.testing import chi_square_p_value


def unit_rows(features: torch.Tensor) -> np.ndarray:
    rows = features.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def herding_by_hand(features: torch.Tensor, num_chosen: int) -> list[int]:
    """The definition, word by word: the distance of every possible mean."""
    rows = unit_rows(features)
    chosen: list[int] = []
    while len(chosen) < min(num_chosen, len(rows)):
        distances = {
            each: np.linalg.norm(rows[[*chosen, each]].mean(axis=0) - rows.mean(axis=0))
            for each in range(len(rows))
            if each not in chosen
        }
        chosen.append(min(distances, key=lambda each: distances[each]))
    return chosen


@settings(deadline=None, max_examples=100)
@given(st.integers(3, 30), st.integers(2, 9), st.integers(0, 35), st.integers(0, 2**32))
def test_herding_is_the_greedy_choice(n: int, d: int, num_chosen: int, seed: int) -> None:
    # At least three samples of two features: two samples are always equally far from their mean.
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)) + 1.0)
    chosen = herding(features, num_chosen)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == herding_by_hand(features, num_chosen)


def test_a_smaller_choice_is_the_beginning_of_a_larger_one() -> None:
    features = torch.from_numpy(np.random.default_rng(3).normal(size=(50, 6)))
    everything = herding(features, 50)
    assert sorted(everything.tolist()) == list(range(50))
    for num_chosen in (0, 1, 7, 49):
        assert np.array_equal(herding(features, num_chosen), everything[:num_chosen])
    assert np.array_equal(herding(features, 1000), everything)


def test_the_mean_of_the_herd_follows_that_of_the_class() -> None:
    """Its distance falls as 1/k; that of random samples as 1/sqrt(k)."""
    features = torch.from_numpy(np.random.default_rng(5).normal(size=(500, 16)) + 0.3)
    rows = unit_rows(features)

    def distance(chosen: np.ndarray) -> float:
        return float(np.linalg.norm(rows[chosen].mean(axis=0) - rows.mean(axis=0)))

    assert distance(herding(features, 64)) < 0.03
    assert distance(at_random(500, 64, np.random.default_rng(0))) > 0.08


def test_the_closest_to_the_mean() -> None:
    features = torch.from_numpy(np.random.default_rng(4).normal(size=(40, 5)))
    rows = unit_rows(features)
    nearest = np.linalg.norm(rows - rows.mean(axis=0), axis=1).argsort()
    assert closest_to_mean(features, 12).tolist() == nearest[:12].tolist()
    assert closest_to_mean(features, 41).tolist() == nearest.tolist()
    assert closest_to_mean(features, 1).tolist() == herding(features, 1).tolist()
    assert herding(features, 12).tolist() != nearest[:12].tolist()
    one_without_direction = torch.cat([torch.zeros(1, 5), features.abs() + 1])
    assert closest_to_mean(one_without_direction, 41)[-1] == 0


@pytest.mark.parametrize("choose", [herding, closest_to_mean])
def test_of_equal_samples_the_first_comes_first(choose: type) -> None:
    some = torch.from_numpy(np.random.default_rng(6).normal(size=(7, 129)))
    features = torch.cat([some] * 5)  # rounding errors depend on the place in the matrix
    chosen = choose(features, 35)
    for original in range(7):
        copies = chosen[chosen % 7 == original].tolist()
        assert copies == sorted(copies)


@pytest.mark.parametrize("choose", [herding, closest_to_mean])
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_lengths_do_not_matter(choose: type, scale: float) -> None:
    generator = np.random.default_rng(7)
    features = torch.from_numpy(generator.normal(size=(30, 8)))
    lengths = torch.from_numpy(generator.uniform(0.1, 10.0, size=(30, 1)))
    assert choose(features * lengths * scale, 30).tolist() == choose(features, 30).tolist()


@pytest.mark.parametrize("choose", [herding, closest_to_mean])
def test_kinds_of_features(choose: type) -> None:
    features = torch.tensor([[4, 1], [0, 0], [1, 4], [1, 1]])
    for dtype in (torch.int32, torch.bfloat16, torch.float32):
        assert choose(features.to(dtype), 1).tolist() == [3]
    assert sorted(choose(features.float().requires_grad_(), 4).tolist()) == [0, 1, 2, 3]
    assert choose(torch.zeros(3, 2), 2).tolist() == [0, 1]
    assert choose(torch.zeros(0, 2), 2).tolist() == []


def test_at_random_is_uniform_and_in_random_order() -> None:
    generator = np.random.default_rng(8)
    times = np.zeros((4, 9))
    for _ in range(3000):
        chosen = at_random(9, 4, generator)
        assert len(set(chosen.tolist())) == 4
        times[np.arange(4), chosen] += 1
    assert all(chi_square_p_value(row, 3000 / 9) > 0.001 for row in times)
    assert sorted(at_random(5, 9, generator).tolist()) == [0, 1, 2, 3, 4]
    assert at_random(0, 3, generator).tolist() == []


@pytest.mark.parametrize("choose", [herding, closest_to_mean])
def test_features_that_break_the_rules(choose: type) -> None:
    with pytest.raises(ValueError, match=r"features of shape \[3\]: it must be \[samples, feat"):
        choose(torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"features of shape \[3, 0\]"):
        choose(torch.zeros(3, 0), 1)
    features = torch.ones(5, 2)
    features[2, 1], features[4, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"features\[2\] is not finite \(2 of 5 samples are not"):
        choose(features, 1)
    with pytest.raises(ValueError, match="num_chosen=-1: it must be at least 0"):
        choose(torch.ones(5, 2), -1)


def test_numbers_that_break_the_rules() -> None:
    with pytest.raises(ValueError, match="num_chosen=-1: it must be at least 0"):
        at_random(3, -1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="num_samples=-2: it must be at least 0"):
        at_random(-2, 1, np.random.default_rng(0))
