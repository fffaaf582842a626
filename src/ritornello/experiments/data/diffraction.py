"""Simulated ptychography: diffraction patterns of objects, and the objects to be found from them.

An object is a complex image: its amplitude comes from one image, its phase from another one of the
same class. A beam (the probe) falls on a part of it; far behind, a detector sees how strong the
light is, but not its phase::

    pattern = | FFT(probe * part of the object) |

A scan moves the beam over one object, step by step, so that neighbouring parts overlap. It is the
group of its patterns: there is one for each class.

Made small and simple: patterns are 16 wide, a scan has 400 of them, objects are smooth and there is
no noise.

Source: the journal extension of Bouvier et al. (Future Generation Computer Systems, 2025, article
107438), which learns from measured scans.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ritornello.experiments.data.data_set import (
    DataSet,
    InMemoryImages,
    LabelledImages,
    Targets,
    of_parts,
)

SUFFIX = "-diffraction"
"""Behind the name of a data set: it gives the objects."""

PARTS = ("amplitude", "phase")

USUAL_SIZE = 16
"""Height and width of patterns, and of the parts that the beam falls on."""

NUM_STEPS = 20
"""Places of the beam along each side of an object: one pixel from one to the next."""

COARSE = 8
"""Objects are as smooth as an image of this height and width that is enlarged: a small model then
learns something in one pass."""

TEST_SHARE = 0.1
"""Of a scan's patterns, chosen at random, for testing."""

LOWEST_AMPLITUDE = 0.5
"""Where an image is black; where it is white the amplitude is 1."""

_SCAN = 1_000_008
"""What the choice of images and patterns is keyed by; no run's seed takes part."""


def simulated(images: DataSet, size: int | None = None) -> DataSet:
    """One scan for each class of a data set's training images.

    Args:
        images: with classes.
        size: of the patterns; None: ``USUAL_SIZE``. Images are made ``size + NUM_STEPS - 1`` wide.

    Returns:
        Patterns uint8 ``[n, 1, size, size]``, the root of the light's amplitude so that weak light
        far from the centre is seen, too; targets float32 ``[n, 2, size, size]``: the amplitude
        from ``LOWEST_AMPLITUDE`` to 1, the phase from -pi/2 to pi/2.

    Raises:
        ValueError: there are no classes, or the size is too small.
    """
    if images.targets is not None:
        raise ValueError(
            f"data: objects for {SUFFIX.removeprefix('-')} are made from images with classes, but "
            f"the targets of {images.name} are tensors"
        )
    size = USUAL_SIZE if size is None else size
    if size < 8:
        raise ValueError(f"image_size={size}: diffraction patterns must be at least 8 wide")
    parts: list[list[Tensor]] = [[], []]
    labels: list[list[int]] = [[], []]
    for label in np.unique(images.train.labels).tolist():
        generator = np.random.default_rng([_SCAN, label])
        scan = parts_of(_object(images.train, label, size + NUM_STEPS - 1, generator), size)
        order = torch.from_numpy(generator.permutation(len(scan)))
        num_test = round(TEST_SHARE * len(scan))
        for part, chosen in enumerate((order[num_test:], order[:num_test])):
            parts[part].append(scan[chosen.sort().values])
            labels[part] += [label] * len(chosen)
    train, test = (
        InMemoryImages(diffracted(objects).numpy(), np.array(of_part), objects.numpy())
        for objects, of_part in zip(map(torch.cat, parts), labels, strict=True)
    )
    targets = Targets((2, size, size), PARTS)
    return of_parts(images.name + SUFFIX, train, test, images.class_names, targets)


def parts_of(whole: Tensor, size: int) -> Tensor:
    """What the beam falls on, place by place, ``[NUM_STEPS ** 2, 2, size, size]``.

    Args:
        whole: the object, ``[2, H, W]``.
        size: of a part.
    """
    parts = whole.unfold(1, size, 1).unfold(2, size, 1)
    return parts.permute(1, 2, 0, 3, 4).reshape(-1, len(whole), size, size)


def probe(size: int) -> Tensor:
    """The beam, float32 ``[size, size]``: a disk whose edge is blurred, 1 in the middle."""
    along = torch.arange(size) - (size - 1) / 2
    radius = torch.sqrt(along.square()[:, None] + along.square())
    return torch.sigmoid((0.42 * size - radius) / (0.03 * size))


def diffracted(objects: Tensor) -> Tensor:
    """What the detector sees of objects in the beam.

    Args:
        objects: float32 ``[n, 2, S, S]``, amplitude and phase.

    Returns:
        uint8 ``[n, 1, S, S]``, the centre of the light in the middle.
    """
    beam = probe(objects.shape[-1])
    light = torch.polar(beam * objects[:, 0], objects[:, 1])
    seen = torch.fft.fftshift(torch.fft.fft2(light).abs(), dim=(1, 2)) / beam.sum()
    patterns: Tensor = (255 * seen.sqrt()).round().clamp(0, 255).to(torch.uint8)
    return patterns[:, None]


def _object(
    images: LabelledImages, label: int, size: int, generator: np.random.Generator
) -> Tensor:
    """Amplitude and phase ``[2, size, size]``, from two images of a class (or one, twice)."""
    own = np.flatnonzero(images.labels == label)
    chosen = generator.permutation(own)[[0, min(1, len(own) - 1)]]
    grey = images.__getitems__(chosen.tolist())[0].float().mean(dim=1, keepdim=True)
    coarse = functional.interpolate(grey, size=(COARSE, COARSE), mode="area")
    lowest, highest = coarse.amin((2, 3), keepdim=True), coarse.amax((2, 3), keepdim=True)
    coarse = (coarse - lowest) / (highest - lowest).clamp(min=1)
    smooth = functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    amplitude, phase = smooth[:, 0]
    whole: Tensor = torch.stack(
        (LOWEST_AMPLITUDE + (1 - LOWEST_AMPLITUDE) * amplitude, math.pi * (phase - 0.5))
    )
    return whole
