"""A buffer begins with old data: every sample is offered, and nothing is drawn that anybody sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ritornello import PeerLostError, RehearsalBuffer
from ritornello.testing import check_consistent, connect_shared_memory, run_ranks
from ritornello.transports import LocalTransport, Transport

Batch = tuple[Tensor, Tensor]


def batches(rank: int, num_steps: int, size: int = 5) -> Iterator[Batch]:
    for step in range(num_steps):
        numbers = rank * 1000 + step * size + torch.arange(size)
        yield numbers, numbers % 4


def make(end: Transport | str = "auto", **arguments: Any) -> RehearsalBuffer:
    given = {"capacity": 30, "num_representatives": 3, "num_candidates": 2, "seed": 5}
    return RehearsalBuffer(transport=end, **(given | arguments))


def held(buffer: RehearsalBuffer) -> list[int]:
    return [int(number) for numbers, _ in buffer.representatives() for number in numbers]


def on_ranks(num_ranks: int, rank_main: Any) -> list[Any]:
    return run_ranks(connect_shared_memory(num_ranks, 20.0), rank_main)


@pytest.mark.parametrize("loader", [torch.rand(50, 3), {"x": torch.rand(5, 3)}, None, 7])
def test_what_gives_no_mini_batches_is_refused(loader: Any) -> None:
    with make(selection="reservoir", label=None) as buffer:
        with pytest.raises(TypeError, match=rf"fill: loader is a {type(loader).__name__}: .*list"):
            buffer.fill(loader)
        buffer.update(torch.rand(5, 3))  # of another form than anything above: nothing was stored


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_sample_is_offered_and_the_first_step_has_past_ones(asynchronous: bool) -> None:
    """As many updates would have stored the same, if all samples were candidates."""
    with (
        make(num_candidates=None) as other,
        make(asynchronous=asynchronous, most_representatives=3) as buffer,
    ):
        for batch in batches(0, 20):
            other.update(batch)
        progress: list[int] = []
        assert buffer.fill(batches(0, 20), progress=progress.append) == 100
        assert progress == list(range(5, 105, 5))
        assert len(buffer) == 30
        assert held(buffer) == held(other)
        assert buffer.stats().num_given == buffer.num_past == 0
        check_consistent(buffer)
        numbers, _ = buffer.update(next(batches(7, 1)))
        assert buffer.num_past == 3
        assert len(numbers) == 8
        assert set(numbers[5:].tolist()) <= set(held(other))
        assert torch.equal(numbers[5:], other.draw()[0])


@pytest.mark.parametrize("lengths", [(4, 0, 9), (0, 0, 3), (0, 0, 0), (3, 3, 3)])
def test_ranks_with_unequally_many_mini_batches_end_together(lengths: tuple[int, ...]) -> None:
    """Also those without any, which hold nothing and draw from the others all the same."""

    def rank_main(end: Transport) -> tuple[int, list[int], list[int]]:
        with make(end) as buffer:
            num_offered = buffer.fill(batches(end.rank, lengths[end.rank]))
            found = held(buffer)
            numbers, _ = buffer.update(next(batches(7 + end.rank, 1)))
            return num_offered, found, numbers[5:].tolist()

    everyone = on_ranks(3, rank_main)
    assert {num_offered for num_offered, _, _ in everyone} == {5 * sum(lengths)}
    assert [len(found) for _, found, _ in everyone] == [min(10, 5 * each) for each in lengths]
    stored = [number for _, found, _ in everyone for number in found]
    drawn = [number for _, _, numbers in everyone for number in numbers]
    assert len(drawn) == (9 if stored else 0)
    assert len(set(stored)) == len(stored)
    assert set(drawn) <= set(stored)
    assert on_ranks(3, rank_main) == everyone


def test_in_the_midst_of_training_the_next_draw_is_made_anew() -> None:
    with make(capacity=200) as buffer:
        for batch in batches(1, 6):
            buffer.update(batch)
        buffer.fill(batches(2, 30))
        assert buffer.num_past == 3  # of the step before
        drawn = [buffer.update((torch.arange(0), torch.arange(0)))[0] for _ in range(40)]
        assert sum(int((numbers >= 2000).sum()) for numbers in drawn) > 60
        buffer.draw()
        buffer.offer(next(batches(3, 1)))


def test_it_is_saved_and_goes_on(tmp_path: Path) -> None:
    with make() as buffer:
        buffer.begin_task("old data")
        buffer.fill(batches(0, 12))
        buffer.begin_task("new data")
        buffer.save(tmp_path)
        expected = [buffer.update(batch)[0] for batch in batches(1, 5)]
        assert buffer.tasks == ("old data", "new data")
    with make() as buffer:
        buffer.load(tmp_path)
        found = [buffer.update(batch)[0] for batch in batches(1, 5)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def failing(rank: int, num_steps: int) -> Iterator[Batch]:
    yield from batches(rank, num_steps)
    raise OSError("the disk is gone")


BAD: dict[str, Any] = {
    "rank 1: batch[1]: the label -3 is out of range": [(torch.arange(2), -torch.arange(3, 5))],
    "the disk is gone": failing(1, 2),
    "'int' object is not iterable": 7,
}


@pytest.mark.parametrize("message", BAD)
def test_what_fails_on_one_rank_ends_it_on_all_and_the_buffer_goes_on(message: str) -> None:
    def rank_main(end: Transport) -> tuple[str, int]:
        with make(end) as buffer:
            with pytest.raises((OSError, RuntimeError, ValueError, TypeError)) as raised:
                buffer.fill(BAD[message] if end.rank else batches(0, 4))
            for batch in batches(3 + end.rank, 3):
                buffer.update(batch)
            check_consistent(buffer)
            return str(raised.value), buffer.num_past

    (other, num_past), (own, _) = on_ranks(2, rank_main)
    assert other.startswith("rank 0: fill failed on rank(s) [1]: see the error there")
    assert message.partition("batch[1]: ")[2] in own
    assert num_past == 3


@pytest.mark.parametrize("at", [5, 20])
def test_progress_that_fails_on_one_rank_ends_it_on_all(at: int) -> None:
    """Behind the first mini-batch, and behind the last one."""

    def rank_main(end: Transport) -> tuple[str, int]:
        def progress(num_offered: int) -> None:
            if end.rank and num_offered >= at:
                raise OSError("the terminal is gone")

        with make(end) as buffer:
            with pytest.raises((OSError, RuntimeError)) as raised:
                buffer.fill(batches(end.rank, 2), progress=progress)
            for batch in batches(3 + end.rank, 2):
                buffer.update(batch)
            return str(raised.value), len(buffer)

    (other, num_held), (own, _) = on_ranks(2, rank_main)
    assert other.startswith("rank 0: fill failed on rank(s) [1]: see the error there")
    assert own == "the terminal is gone"
    assert num_held > (10 if at == 5 else 20)  # what was offered before, and some of the updates


def test_a_rank_that_trains_meanwhile_is_named() -> None:
    def rank_main(end: Transport) -> str:
        with pytest.raises(PeerLostError) as raised, make(end) as buffer:
            if end.rank == 0:
                buffer.fill(batches(0, 3))
            for batch in batches(1, 3):
                buffer.update(batch)
        return str(raised.value)

    first, second = on_ranks(2, rank_main)
    assert "rank(s) [1] are in a round: all ranks must call update equally often, and fill" in first
    assert "rank(s) [0] are in fill, and this one in a round" in second


def test_closed() -> None:
    buffer = make(LocalTransport())
    buffer.close()
    with pytest.raises(RuntimeError, match=r"fill after close\(\)"):
        buffer.fill([])
