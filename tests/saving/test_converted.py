"""A saved buffer whose samples get another form while they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ritornello import CheckpointError, RehearsalBuffer

Made = Callable[..., RehearsalBuffer]


@pytest.fixture
def make() -> Iterator[Made]:
    made: list[RehearsalBuffer] = []

    def make(capacity: int = 30, **arguments: Any) -> RehearsalBuffer:
        made.append(RehearsalBuffer(capacity, num_representatives=4, **arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


def batch(first: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(first, first + 8)
    return numbers[:, None].float(), numbers % 3


def widened(batch: Any) -> Any:
    """A wider field, and one more before the label."""
    numbers, labels = batch
    return torch.cat((numbers, numbers + 0.5), dim=1), labels, numbers[:, 0].to(torch.int32)


@pytest.fixture
def saved(make: Made, tmp_path: Path) -> Path:
    buffer = make()
    for step in range(8):
        buffer.update(batch(8 * step))
    buffer.save(tmp_path / "saved")
    return tmp_path / "saved"


def contents(buffer: RehearsalBuffer) -> dict[float, tuple[Any, ...]]:
    """Number to the other fields, of all representatives."""
    found = {}
    for numbers, *others in buffer.representatives():
        for row, number in enumerate(numbers):
            found[float(number[0])] = (number.tolist(), *(int(other[row]) for other in others))
    return found


@pytest.mark.parametrize("capacity", [30, 40, 12])
def test_every_representative_is_converted(saved: Path, capacity: int, make: Made) -> None:
    plain, buffer = (make(capacity) for _ in range(2))
    plain.load(saved)
    buffer.load(saved, convert=widened)
    found = contents(buffer)
    assert found == {n: ([n, n + 0.5], int(n) % 3, int(n)) for n in found}
    assert set(found) == set(contents(plain))
    assert len(found) == min(capacity, 30)
    past = buffer.draw()
    assert past is not None
    numbers, labels, further = past  # type: ignore[misc]
    assert numbers.shape == (4, 2)
    assert torch.equal(numbers[:, 0] % 3, labels.float())
    assert torch.equal(numbers[:, 0].int(), further)
    buffer.offer(widened(batch(64)))
    for step in range(9, 16):
        numbers, labels, further = buffer.update(widened(batch(8 * step)))
        assert numbers.shape == (12, 2)
        assert torch.equal(numbers[:, 0] % 3, labels.float())
    assert len(buffer) == capacity


def test_it_is_reproducible_and_can_be_saved_again(saved: Path, make: Made, tmp_path: Path) -> None:
    drawn = []
    for number in range(2):
        buffer = make()
        buffer.load(saved, convert=widened)
        buffer.save(tmp_path / str(number))
        again = make()
        again.load(tmp_path / str(number))
        drawn += [each.update(widened(batch(100)))[0] for each in (buffer, again)]
    for each in drawn[1:]:
        assert torch.equal(each, drawn[0])


def test_a_buffer_that_had_not_begun(make: Made, tmp_path: Path) -> None:
    make().save(tmp_path)
    buffer = make()
    buffer.load(tmp_path, convert=widened)
    assert len(buffer) == 0
    assert len(buffer.update(widened(batch(0)))[0]) == 8


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda batch: batch[0], "the converted samples have no label at"),
        (lambda batch: (batch[0][:-1], batch[1][:-1]), "convert: .* samples have become"),
        (lambda batch: (batch[0], batch[1][:-1]), "all leaves of a mini-batch need the same"),
        (lambda batch: (batch[1], batch[0]), "label"),
        (lambda batch: (batch[0], (batch[1] + 1) % 3), "convert: labels have changed"),
        (lambda batch: "none", "batch is a str; the buffer holds tensors"),
    ],
    ids=["no label", "fewer", "fewer labels", "label is no integer", "other labels", "no tensors"],
)
def test_what_is_no_conversion(
    convert: Callable[[Any], Any], message: str, saved: Path, make: Made
) -> None:
    buffer = make()
    with pytest.raises(CheckpointError, match=message):
        buffer.load(saved, convert=convert)
    buffer.load(saved)
    assert len(buffer) == 30
