from __future__ import annotations

import numpy as np
import pytest
import torch

from ritornello.experiments.strategies.distances import squared
from ritornello.experiments.strategies.errors import error_criterion, errors_of
from ritornello.experiments.strategies.finite_logits import FiniteLogits


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_mean_error_of_each_part(shape: tuple[int, ...], num_parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = (torch.randn(5, *shape, generator=generator) for _ in range(2))
    by_hand = (outputs - targets).numpy().reshape(5, num_parts, -1)
    for loss, expected in (("mae", np.abs(by_hand)), ("mse", by_hand**2)):
        found = errors_of(loss, outputs, targets, num_parts)
        assert np.allclose(found, expected.mean(axis=2), atol=1e-6)
        criterion = error_criterion(loss, num_parts)
        assert torch.equal(criterion(outputs, targets), found.sum(dim=1))
        assert criterion(outputs[:0], targets[:0]).shape == (0,)


def test_shapes_that_would_be_stretched_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the model says \[5, 1\] where the targets are \[5\]"):
        errors_of("mae", torch.zeros(5, 1), torch.zeros(5), 1)


def test_the_distance_of_images_is_the_mean_over_all_pixels() -> None:
    now, then = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    expected = ((now - then) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(squared(now, then), expected)


def test_images_that_are_not_finite_are_counted_by_sample() -> None:
    images = torch.zeros(4, 2, 3, 3)
    images[1, 0], images[3, 1, 2, 2] = torch.inf, torch.nan
    with pytest.raises(FloatingPointError, match=r"the logits of 2 new sample\(s\) are not finite"):
        FiniteLogits().look(images, task=0)
