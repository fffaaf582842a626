"""Distances of logits: closed forms."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor, nn

from ritornello.experiments.strategies.distances import (
    DISTANCES,
    distance_named,
    jensen_shannon,
    squared,
)


def logits(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(7, 5, generator=generator, dtype=torch.float64)


def test_the_squared_distance_is_the_mean_over_the_classes() -> None:
    said, wanted = logits(0), logits(1)
    expected = nn.functional.mse_loss(said, wanted, reduction="none").mean(dim=1)
    torch.testing.assert_close(squared(said, wanted), expected)


def test_jensen_shannon_of_two_classes_in_closed_form() -> None:
    p, q = 0.9, 0.2
    said, wanted = (torch.tensor([[log(each), log(1 - each)]]) for each in (p, q))
    m = (p + q) / 2
    entropy = lambda share: -share * log(share) - (1 - share) * log(1 - share)  # noqa: E731
    expected = entropy(m) - (entropy(p) + entropy(q)) / 2
    assert jensen_shannon(said, wanted).item() == pytest.approx(expected, rel=1e-5)


def test_jensen_shannon_is_the_mean_divergence_from_the_middle() -> None:
    said, wanted = logits(0), logits(1)
    p, q = said.softmax(dim=1), wanted.softmax(dim=1)
    m = (p + q) / 2
    divergences = [(each * (each / m).log()).sum(dim=1) for each in (p, q)]
    torch.testing.assert_close(jensen_shannon(said, wanted), sum(divergences) / 2)
    torch.testing.assert_close(jensen_shannon(said, wanted), jensen_shannon(wanted, said))
    assert jensen_shannon(said, said + 3.0).abs().max() < 1e-15  # softmaxes are the same


def test_jensen_shannon_is_at_most_the_logarithm_of_two_however_large_logits_are() -> None:
    far = torch.tensor([[3e4, 0.0, 0.0], [0.0, 3e4, 0.0]]).requires_grad_()
    away = jensen_shannon(far, far.detach().flip(0))
    assert away.tolist() == pytest.approx([log(2), log(2)])
    away.sum().backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()
    away = jensen_shannon(logits(0, 50.0), logits(1, 50.0))
    assert 0 < away.min() < away.max() <= log(2) + 1e-12


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    wanted = logits(1)
    said = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: distance_named(name)(each, wanted), (said,))


def test_half_precision_is_computed_in_that_of_the_model() -> None:
    for distance in DISTANCES.values():
        away = distance(logits(0), logits(1).half())
        assert away.dtype == torch.float64
        torch.testing.assert_close(away, distance(logits(0), logits(1).half().double()))


def test_a_distance_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="distance='kl': there are mse, js"):
        distance_named("kl")
