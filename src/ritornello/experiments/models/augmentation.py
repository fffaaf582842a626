"""From stored pixels to what the model sees: scaling, augmentation and normalisation.

It happens on the device, after the mini-batch was joined with representatives. The rehearsal
buffer therefore stores a quarter of the bytes, and a representative looks different each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.load import OF_OBJECTS as IN_ARRAYS
from ritornello.experiments.models.weights import normalisation_of
from ritornello.experiments.recipes.recipe import Recipe

Size = tuple[int, int]
"""Height and width."""


def crop(image_size: Size, crop_size: Size) -> nn.Module:
    """Adds a black border of 4 pixels, and crops at random: for what has a left and a right."""
    from kornia.augmentation import RandomCrop

    return nn.Sequential(RandomCrop(crop_size, padding=4))


def crop_flip(image_size: Size, crop_size: Size) -> nn.Module:
    """Adds a black border of 4 pixels, crops at random, and flips half of them.

    The usual augmentation for CIFAR, and that of Buzzega et al. (NeurIPS 2020) for Tiny ImageNet.
    """
    from kornia.augmentation import RandomCrop, RandomHorizontalFlip

    return nn.Sequential(RandomCrop(crop_size, padding=4), RandomHorizontalFlip())


def resized_crop_flip(image_size: Size, crop_size: Size) -> nn.Module:
    """Crops 8 to 100 % of the image at random, resizes what it cropped, and flips half of them.

    The usual augmentation for ImageNet (Szegedy et al., "Going deeper with convolutions", 2015).
    """
    from kornia.augmentation import RandomHorizontalFlip, RandomResizedCrop

    # "resample" crops the whole mini-batch at once; "slice" would go through it sample by sample.
    crop = RandomResizedCrop(
        crop_size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), cropping_mode="resample"
    )
    return nn.Sequential(crop, RandomHorizontalFlip())


AUGMENTATIONS: dict[str, Callable[[Size, Size], nn.Module] | None] = {
    "none": None,
    "crop": crop,
    "crop-flip": crop_flip,
    "resized-crop-flip": resized_crop_flip,
}
"""Augmentation to what makes it, from the sizes of the stored images and of the crops."""


class Pixels(nn.Module):
    """Makes of stored images what the model sees, differently in training and in evaluation.

    Augmentation draws from torch's global random state, for each sample anew.

    Args:
        image_shape: ``(C, H, W)`` of the stored images.
        augmentation: one of ``AUGMENTATIONS``.
        crop_size: height and width of what the model sees; None: those of the image.
        mean: per channel, of pixels scaled to [0, 1]; what normalisation subtracts.
        std: per channel; what normalisation divides by.
        seen_size: height and width of what the model sees, if that is resized to it (its shorter
            side, behind all else) and cropped at the centre; then ``crop_size`` comes before.
        num_channels: that the model sees, if it sees grey images several times over.

    Attributes:
        image_shape: ``(C, H, W)`` of what the model sees.

    Raises:
        ValueError: no such augmentation, or a crop that is larger than the image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        augmentation: str = "none",
        crop_size: int | None = None,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        seen_size: int | None = None,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation={augmentation!r}: there are {', '.join(AUGMENTATIONS)}")
        channels, height, width = image_shape
        if crop_size is not None and not 1 <= crop_size <= min(height, width):
            raise ValueError(
                f"crop_size={crop_size}: it must be from 1 to the size of the stored images "
                f"({height} x {width})"
            )
        self._crop = (height, width) if crop_size is None else (crop_size, crop_size)
        if seen_size is not None and seen_size < 1:
            raise ValueError(f"image_size={seen_size}: it must be at least 1")
        self._seen_size = None if self._crop == (seen_size, seen_size) else seen_size
        seen = self._crop if self._seen_size is None else (self._seen_size, self._seen_size)
        self.image_shape = (num_channels or channels, *seen)
        augment = AUGMENTATIONS[augmentation]
        self._augment = None if augment is None else augment((height, width), self._crop)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def of(cls, recipe: Recipe, data: DataSet) -> Pixels:
        """What a recipe asks for."""
        mean, std = data.mean, data.std
        channels = num_channels = data.image_shape[0]
        if recipe.weights is not None:
            mean, std = normalisation_of(recipe.model)
            num_channels = len(mean) if channels == 1 else channels
        if recipe.pixels != "standardised":
            mean, std = (0.0,), (1.0,)
        return cls(
            data.image_shape,
            recipe.augmentation,
            recipe.crop_size,
            mean,
            std,
            seen_size=recipe.image_size if recipe.data in IN_ARRAYS else None,
            num_channels=num_channels,
        )

    def for_training(self, images: Tensor) -> Tensor:
        """Augmented and normalised.

        Args:
            images: uint8 ``[b, C, H, W]``, on the module's device.

        Returns:
            float32 ``[b, *image_shape]``.
        """
        if self._augment is None:
            return self.for_evaluation(images)
        # Where a crop begins needs all the digits that mixed precision would take away.
        with torch.autocast(images.device.type, enabled=False):
            augmented: Tensor = self._augment(images.float() / 255)
        return self._normal(augmented)

    def for_evaluation(self, images: Tensor) -> Tensor:
        """Cropped at the centre and normalised; shapes as for ``for_training``."""
        height, width = self._crop
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        cropped = images[:, :, top : top + height, left : left + width]
        return self._normal(cropped.float() / 255)

    def _normal(self, images: Tensor) -> Tensor:
        if self._seen_size is not None:
            images = resized(images, self._seen_size)
        normal: Tensor = (images - self.mean) / self.std
        return normal.expand(-1, self.image_shape[0], -1, -1)


class Features(nn.Module):
    """Stands for ``Pixels`` where samples are features: the model sees them as they are."""

    def for_training(self, features: Tensor) -> Tensor:
        """float32 ``[b, ...]``."""
        return features.float()

    def for_evaluation(self, features: Tensor) -> Tensor:
        """float32 ``[b, ...]``."""
        return features.float()


def resized(images: Tensor, size: int) -> Tensor:
    """Images ``[b, C, H, W]`` whose shorter side has a size, cropped at the centre to a square."""
    height, width = images.shape[2:]
    scale = size / min(height, width)
    sides = [max(size, round(side * scale)) for side in (height, width)]
    grown = nn.functional.interpolate(images, sides, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in sides)
    return grown[:, :, top : top + size, left : left + size]
