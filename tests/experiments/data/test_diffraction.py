from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ritornello.experiments.data import diffraction
from ritornello.experiments.data.load import load


def test_a_scan_for_each_class() -> None:
    data = load("digits-diffraction")
    assert data.name == "digits-diffraction"
    assert data.image_shape == (1, 16, 16)
    assert data.targets is not None
    assert (data.targets.shape, data.targets.parts) == ((2, 16, 16), ("amplitude", "phase"))
    assert np.bincount(data.train.labels).tolist() == [360] * 10
    assert np.bincount(data.test.labels).tolist() == [40] * 10
    patterns, objects = data.train.__getitems__([7, 700, 3_599])
    assert patterns.dtype == torch.uint8
    assert torch.equal(patterns, diffraction.diffracted(objects))
    amplitude, phase = data.train.__getitems__(range(len(data.train)))[1].unbind(1)
    assert 0.5 <= amplitude.min() < 0.55 < 0.95 < amplitude.max() <= 1
    assert -math.pi / 2 <= phase.min() < -1 < 1 < phase.max() <= math.pi / 2 + 1e-5
    again = load("digits-diffraction").train.__getitems__([7, 700, 3_599])
    assert torch.equal(again[0], patterns)
    assert torch.equal(again[1], objects)
    assert load("digits-diffraction", image_size=32).image_shape == (1, 32, 32)


def test_neighbouring_parts_overlap() -> None:
    whole = torch.arange(2 * 35 * 35).float().view(2, 35, 35)
    parts = diffraction.parts_of(whole, 16)
    assert parts.shape == (400, 2, 16, 16)
    assert torch.equal(parts[0], whole[:, :16, :16])
    assert torch.equal(parts[1][..., :-1], parts[0][..., 1:])
    assert torch.equal(parts[399], whole[:, 19:, 19:])


def test_the_pattern_is_the_amplitude_of_the_light() -> None:
    generator = torch.Generator().manual_seed(0)
    objects = torch.rand(2, 2, 16, 16, generator=generator)
    beam = diffraction.probe(16)
    assert beam[7:9, 7:9].min() > 0.99
    assert beam[0, 0] < 0.01
    assert torch.equal(beam, beam.flip(0))
    patterns = diffraction.diffracted(objects)
    for pattern, (amplitude, phase) in zip(patterns, objects.numpy(), strict=True):
        light = np.fft.fftshift(np.fft.fft2(beam.numpy() * amplitude * np.exp(1j * phase)))
        expected = 255 * np.sqrt(np.abs(light) / beam.numpy().sum())
        assert np.abs(pattern[0].numpy() - expected).max() < 0.51
    # A phase that is the same everywhere is not seen.
    turned = objects + torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert (diffraction.diffracted(turned).int() - patterns.int()).abs().max() <= 1


def test_what_cannot_be_scanned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=4: diffraction patterns must be at least 8"):
        load("digits-diffraction", image_size=4)
    images, targets = np.zeros((4, 8, 8), dtype=np.uint8), np.zeros(4)
    path = tmp_path / "tensors.npz"
    np.savez(
        path,
        train_images=images, train_targets=targets, test_images=images, test_targets=targets,
    )  # fmt: skip
    with pytest.raises(ValueError, match="but the targets of mnist are tensors"):
        load("mnist-diffraction", str(path))
