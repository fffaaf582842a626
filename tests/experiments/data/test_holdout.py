from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ritornello.experiments.data.data_set import Arrival, DataSet, InMemoryImages
from ritornello.experiments.data.holdout import held_out
from ritornello.experiments.data.load import load


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def test_a_share_of_each_class_takes_the_place_of_the_test_samples(digits: DataSet) -> None:
    data = held_out(digits, 0.1)
    assert len(data.train) + len(data.test) == len(digits.train)
    sizes = np.bincount(digits.train.labels)
    assert np.bincount(data.test.labels).tolist() == [round(0.1 * size) for size in sizes.tolist()]
    assert (data.mean, data.std, data.class_names) == (digits.mean, digits.std, digits.class_names)


def test_each_sample_is_either_trained_on_or_tested(digits: DataSet) -> None:
    data = held_out(digits, 0.3)
    found = [
        (image.numpy().tobytes(), int(label))
        for part in (data.train, data.test)
        for image, label in zip(*part.__getitems__(range(len(part))), strict=True)
    ]
    everything = digits.train.__getitems__(range(len(digits.train)))
    assert sorted(found) == sorted(
        (image.numpy().tobytes(), int(label)) for image, label in zip(*everything, strict=True)
    )


def test_it_is_the_same_every_time(digits: DataSet) -> None:
    first, second = (held_out(digits, 0.1).test.__getitems__(range(50)) for _ in range(2))
    assert all(bool((one == other).all()) for one, other in zip(first, second, strict=True))


def test_nothing_is_held_out_by_default(digits: DataSet) -> None:
    assert held_out(digits, 0.0) is digits


def of_arrivals(*labels: list[int]) -> DataSet:
    joined = np.concatenate([np.array(each) for each in labels])
    # The last arrival stands first: positions are not in the order of time.
    ends = np.cumsum([len(each) for each in labels])
    train = [np.arange(end - len(each), end) for end, each in zip(ends, labels, strict=True)]
    arrivals = tuple(
        Arrival(f"day {number}", own, np.arange(0)) for number, own in enumerate(reversed(train))
    )
    images = np.arange(len(joined), dtype=np.uint8).reshape(-1, 1, 1, 1)
    part = InMemoryImages(images, joined)
    return DataSet("days", part, part, ("a", "b"), (0.5,), (0.5,), arrivals)


def test_each_arrival_gives_of_its_own() -> None:
    data = of_arrivals([0] * 10 + [1] * 4, [0], [1] * 20)
    held = held_out(data, 0.2)
    assert held.arrivals is not None
    assert data.arrivals is not None
    for arrival, before in zip(held.arrivals, data.arrivals, strict=True):
        assert arrival.name == before.name
        own = {int(pixel) for pixel in before.train_indices}
        parts = [
            part.__getitems__(indices.tolist())[0].flatten().tolist() if len(indices) else []
            for part, indices in (
                (held.train, arrival.train_indices),
                (held.test, arrival.test_indices),
            )
        ]
        assert sorted(parts[0] + parts[1]) == sorted(own)
    # A sample that is alone is trained on.
    assert [len(each.test_indices) for each in held.arrivals] == [4, 0, 3]


def test_a_class_of_two_has_one_for_each() -> None:
    data = replace(of_arrivals([0, 0, 1, 1]), arrivals=None)
    held = held_out(data, 0.05)
    assert held.train.labels.tolist() == held.test.labels.tolist() == [0, 1]
