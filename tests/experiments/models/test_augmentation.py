from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ritornello.experiments.data.load import load
from ritornello.experiments.models.augmentation import AUGMENTATIONS, Pixels
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe, with_changes

RANDOM = [name for name in AUGMENTATIONS if name != "none"]


@pytest.fixture(autouse=True)
def own_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def test_without_augmentation_pixels_are_scaled_and_normalised() -> None:
    pixels = Pixels((2, 3, 4), mean=(0.25, 0.5), std=(0.5, 0.25))
    stored = images(5, 2, 3, 4)
    seen = pixels.for_training(stored)
    assert seen.dtype == torch.float32
    assert torch.allclose(seen[:, 0], (stored[:, 0] / 255 - 0.25) / 0.5)
    assert torch.allclose(seen[:, 1], (stored[:, 1] / 255 - 0.5) / 0.25)
    assert torch.equal(pixels.for_evaluation(stored), seen)
    assert pixels.image_shape == (2, 3, 4)


def test_what_a_recipe_asks_for() -> None:
    digits = load("digits")
    recipe = Recipe("test", "", "digits")
    everything = digits.train.__getitems__(range(len(digits.train)))[0]
    seen = Pixels.of(recipe, digits).for_evaluation(everything)
    assert seen.mean().abs() < 1e-4
    assert (seen.std() - 1).abs() < 1e-3
    unit = Pixels.of(replace(recipe, pixels="unit", crop_size=6), digits)
    seen = unit.for_evaluation(everything)
    assert (seen.min(), seen.max()) == (0, 1)
    assert torch.equal(seen, everything[:, :, 1:7, 1:7] / 255)
    assert unit.image_shape == (1, 6, 6)


@pytest.mark.parametrize("augmentation", RANDOM)
@pytest.mark.parametrize("crop_size", [None, 20])
def test_samples_are_augmented_one_by_one_and_repeat_with_the_seed(
    augmentation: str, crop_size: int | None
) -> None:
    pixels = Pixels((3, 24, 32), augmentation, crop_size)
    stored = images(1, 3, 24, 32).expand(16, -1, -1, -1)
    first, second = pixels.for_training(stored), pixels.for_training(stored)
    assert first.shape == (16, *pixels.image_shape)
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1
    assert len(first.flatten(1).unique(dim=0)) > 10
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(pixels.for_training(stored), first)
    torch.manual_seed(1)
    assert not torch.equal(pixels.for_training(stored), first)
    # What is evaluated is not augmented.
    assert len(pixels.for_evaluation(stored).flatten(1).unique(dim=0)) == 1


def test_crop_flip_shifts_by_at_most_4_pixels_and_flips_half() -> None:
    stored = images(1, 1, 16, 16).clamp(min=1).expand(900, -1, -1, -1)
    bordered = torch.nn.functional.pad(stored[0, 0] / 255, [4, 4, 4, 4])
    crops = [bordered[top : top + 16, left : left + 16] for top in range(9) for left in range(9)]
    possible = torch.stack([*crops, *(crop.flip(1) for crop in crops)]).flatten(1)
    seen = Pixels((1, 16, 16), "crop-flip").for_training(stored).flatten(1)
    equal = (seen[:, None] == possible).all(2)
    assert equal.any(1).all()
    which = equal.int().argmax(1)
    # False alarms: below 1e-6 for each of the two (900 draws, 162 possible crops).
    assert len(which.unique()) > 145
    assert abs((which < 81).float().mean() - 0.5) < 0.1


def test_resized_crop_flip_covers_8_to_100_percent() -> None:
    # A pixel's value is its column, so that neighbours tell how much was cropped.
    columns = torch.arange(64, dtype=torch.uint8).expand(500, 1, 64, 64)
    seen = Pixels((1, 64, 64), "resized-crop-flip", crop_size=32).for_training(columns) * 255
    extent = seen[:, 0, 0, -1] - seen[:, 0, 0, 0]
    assert abs((extent > 0).float().mean() - 0.5) < 0.12
    widths = extent.abs() + 1
    assert widths.min() < 25
    assert widths.max() > 58
    assert widths.min() >= 64 * (0.08 * 0.75) ** 0.5 - 2
    # Bilinear between the ends: no jumps.
    steps = seen[:, 0, 0].diff(dim=1).abs()
    assert torch.allclose(steps, steps.mean(1, keepdim=True).expand_as(steps), atol=1e-2)


@pytest.mark.parametrize("augmentation", RANDOM)
def test_mixed_precision_does_not_move_the_crops(augmentation: str) -> None:
    pixels = Pixels((3, 200, 200), augmentation, crop_size=160)
    stored = images(2, 3, 200, 200)
    expected = pixels.for_training(stored)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixels.for_training(stored), expected)


def test_no_augmentation_loads_no_kornia() -> None:
    code = (
        "import sys; from ritornello.experiments.models.augmentation import Pixels; "
        "Pixels((1, 4, 4)); assert 'kornia' not in sys.modules; "
        "Pixels((1, 4, 4), 'crop-flip'); assert 'kornia' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="augmentation='mixup': there are none, crop, crop-flip, "):
        Pixels((1, 8, 8), "mixup")
    for crop_size in (0, 9):
        message = rf"crop_size={crop_size}: it must be from 1 to .* stored images \(10 x 8\)"
        with pytest.raises(ValueError, match=message):
            Pixels((1, 10, 8), "crop-flip", crop_size)


@pytest.mark.accelerator
@pytest.mark.parametrize("accelerator", ["random-1"], indirect=True)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_on_a_device(accelerator: str, augmentation: str) -> None:
    pixels = Pixels((3, 40, 40), augmentation, 32, (0.5,) * 3, (0.2,) * 3)
    stored = images(8, 3, 40, 40)
    torch.manual_seed(0)
    expected = pixels.for_training(stored)
    torch.manual_seed(0)
    seen = pixels.to(accelerator).for_training(stored.to(accelerator))
    assert torch.allclose(seen.cpu(), expected, atol=1e-3)


def test_images_in_arrays_grow_to_what_the_model_shall_see() -> None:
    data = load("digits")
    pixels = Pixels.of(recipe_named("digits", image_size=32), data)
    assert pixels.image_shape == (1, 32, 32)
    some = data.test.__getitems__(range(3))[0]
    for seen in (pixels.for_evaluation(some), pixels.for_training(some)):
        assert seen.shape == (3, 1, 32, 32)
        small = Pixels.of(recipe_named("digits"), data).for_evaluation(some)
        torch.testing.assert_close(nn.functional.avg_pool2d(seen, 4), small, atol=1.0, rtol=0)
    wide = Pixels((3, 8, 12), seen_size=16)
    assert wide.for_evaluation(torch.zeros(2, 3, 8, 12, dtype=torch.uint8)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="image_size=0: it must be at least 1"):
        Pixels((3, 8, 8), seen_size=0)


def test_a_model_with_weights_sees_pixels_as_it_was_trained() -> None:
    """Grey images three times over."""
    data = load("digits")
    recipe = recipe_named("digits", model="resnet18", weights="a file", image_size=16)
    pixels = Pixels.of(recipe, data)
    assert pixels.image_shape == (3, 16, 16)
    white = pixels.for_evaluation(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8))
    expected = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(white[0, :, 5, 5], torch.tensor(expected))
    plain = Pixels.of(with_changes(recipe, pixels="unit"), data)
    white = plain.for_evaluation(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8))
    torch.testing.assert_close(white, torch.ones(1, 3, 16, 16))
