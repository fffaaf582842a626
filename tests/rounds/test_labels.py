"""More distinct labels than slots: what the user is told, and what it costs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from ritornello import ClassBalanced, RehearsalBuffer
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport


def indexed(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A mini-batch of a data set that gives (image, index, label)."""
    index = 8 * step + torch.arange(8)
    return index[:, None].float(), index, index % 10


@pytest.mark.parametrize(
    ("capacity_bytes", "number"), [(100_000, "2[1-4]"), (1500, "about [1-9][0-9]")]
)
def test_also_where_samples_are_of_unequal_length(capacity_bytes: int, number: str) -> None:
    """Also where so few fit into the bytes that no slot is short."""

    def lists(step: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        _, index, label = indexed(step)
        return [torch.full((1 + i % 7,), i) for i in index.tolist()], index, label

    def play(label: int) -> int:
        arguments = {"num_representatives": 2, "capacity_bytes": capacity_bytes, "label": label}
        with RehearsalBuffer(20, **arguments) as buffer:
            for step in range(40):
                buffer.update(lists(step))
            return len(buffer)

    message = f"^label=1, which is .* has {number} distinct values so far, but the buffer has 20"
    with pytest.warns(UserWarning, match=message):
        num_held = play(label=1)
    assert (num_held == 20) == (capacity_bytes == 100_000)
    play(label=2)  # of ten classes nothing is said


@pytest.mark.parametrize("selection", ["class-balanced", "class-balanced-reservoir", "grasp"])
def test_a_label_with_more_values_than_slots_is_named_once(selection: str) -> None:
    with RehearsalBuffer(20, num_representatives=2, selection=selection) as buffer:
        message = (
            r"^label=1, which is batch\[1\], has 2[1-4] distinct values so far, but the "
            r"buffer has 20 slots: .*, and nothing of the others. Often label= names the wrong leaf, "
            r"such as an index, an id or a timestamp. If these are classes, raise the capacity; if "
            r"there are none, take selection='reservoir'$"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(3):
                buffer.update(indexed(step))  # the third mini-batch's round is not yet over
        with pytest.warns(UserWarning, match=message):
            buffer.update(indexed(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(4, 30):
                buffer.update(indexed(step))
            buffer.stats()


def test_labels_in_their_place_are_no_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in ({"label": 2}, {"selection": "reservoir"}, {"capacity": 240}):
            with RehearsalBuffer(
                **{"capacity": 20, "num_representatives": 2, **arguments}
            ) as buffer:
                for step in range(30):
                    buffer.update(indexed(step))


def test_as_an_error_it_ends_the_step_and_not_the_buffer() -> None:
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        for step in range(3):
            buffer.update(indexed(step))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="label=1"):
                buffer.update(indexed(3))
            assert len(buffer.update(indexed(3))[0]) == 10
            assert buffer.stats().num_rounds == 4


def test_ranks_name_themselves_and_say_about() -> None:
    def rank_main(end: Transport) -> None:
        with RehearsalBuffer(20, num_representatives=2, transport=end) as buffer:
            for step in range(20):
                buffer.update(indexed(step))

    with pytest.warns(UserWarning, match="label=1") as caught:
        run_ranks(LocalTransport.connect(2), rank_main)
    told = sorted(str(each.message) for each in caught)
    assert len(told) == 2
    for rank, message in enumerate(told):
        assert message.startswith(f"rank {rank}: label=1, which is ")
        assert "has about " in message
        assert "20 slots" in message


def test_too_many_fixed_shares_are_told_of() -> None:
    with RehearsalBuffer(
        20, num_representatives=2, selection=ClassBalanced(30, shares="fixed"), label=2
    ) as buffer:
        buffer.update(indexed(0))
        with pytest.warns(UserWarning, match="label=2, .* has 30 distinct values so far"):
            buffer.update(indexed(1))


@pytest.mark.filterwarnings("ignore:label=1")
@pytest.mark.parametrize("selection", ["class-balanced", "class-balanced-reservoir"])
def test_a_save_is_no_larger_for_labels_that_hold_nothing(selection: str, tmp_path: Path) -> None:
    sizes = []
    with RehearsalBuffer(20, num_representatives=0, selection=selection) as buffer:
        for steps in (range(10), range(10, 200)):
            for step in steps:
                buffer.update(indexed(step))
            buffer.save(tmp_path)
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob("shard-*")))
    assert sizes[0] == sizes[1]


def test_of_fixed_shares_nothing_is_said_before_the_first_mini_batch() -> None:
    selection = ClassBalanced(40, shares="fixed")
    with RehearsalBuffer(13, num_representatives=2, selection=selection) as buffer:
        assert len(buffer) == 0
        buffer.begin_task("first")
