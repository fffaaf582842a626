"""Ranks with unequally many mini-batches end together, and train on all they have."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ritornello
from ritornello import PeerLostError, RehearsalBuffer, evenly
from ritornello.testing import connect_shared_memory, run_ranks, spawn_ranks
from ritornello.transports import Transport


class Sample(NamedTuple):
    number: Tensor
    label: Tensor


def stream(rank: int, num_steps: int, size: int = 4) -> Iterator[Sample]:
    for step in range(num_steps):
        numbers = rank * 1000 + step * size + torch.arange(size)
        yield Sample(numbers, numbers % 3)


def make(end: Transport, **arguments: Any) -> RehearsalBuffer:
    return RehearsalBuffer(20, num_representatives=2, transport=end, **arguments)


def on_ranks(num_ranks: int, rank_main: Any) -> list[Any]:
    return run_ranks(connect_shared_memory(num_ranks, 20.0), rank_main)


LENGTHS = [(5, 3, 1), (0, 4, 2), (2, 2, 2), (0, 0, 0)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ahead", [False, True])
def test_all_ranks_end_together_and_leave_nothing_out(
    lengths: tuple[int, ...], ahead: bool
) -> None:
    """Also ranks that never had anything, whose empty mini-batches are like those of the others."""

    def rank_main(end: Transport) -> list[Sample]:
        with make(end) as buffer:
            even = evenly(stream(end.rank, lengths[end.rank]), buffer)
            if ahead:
                return list(ritornello.rehearse(even, buffer))
            return [buffer.update(batch) for batch in even]

    for rank, steps in enumerate(on_ranks(3, rank_main)):
        assert len(steps) == max(lengths)
        own = [4] * lengths[rank] + [0] * (max(lengths) - lengths[rank])
        past = [0] + [2] * max(lengths)
        sizes = [len(numbers) for numbers, _ in steps]
        assert sizes == [new + old for new, old in zip(own, past, strict=False)]
        assert all(type(each) is Sample for each in steps)
        new = [number for step, size in zip(steps, own, strict=True) for number in step[0][:size]]
        assert new == [number for step in stream(rank, lengths[rank]) for number in step.number]


def test_it_is_the_plain_loop_where_all_have_as_many() -> None:
    def plain(end: Transport) -> list[Tensor]:
        with make(end) as buffer:
            return [buffer.update(batch)[0] for batch in stream(end.rank, 6)]

    def even(end: Transport) -> list[Tensor]:
        with make(end) as buffer:
            return [buffer.update(batch)[0] for batch in evenly(stream(end.rank, 6), buffer)]

    for ours, theirs in zip(on_ranks(2, even), on_ranks(2, plain), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_iteration_begins_anew_and_remembers_what_mini_batches_are_like() -> None:
    """A rank that had some in the first epoch needs nobody to tell it in the second."""

    def rank_main(end: Transport) -> list[int]:
        lengths = iter([(2, 1), (0, 3)])

        class Epochs:
            def __iter__(self) -> Iterator[Sample]:
                return stream(end.rank, next(lengths)[end.rank])

        with make(end) as buffer:
            even = evenly(Epochs(), buffer)
            return [len(buffer.update(batch)[0]) for _ in range(2) for batch in even]

    assert on_ranks(2, rank_main) == [[4, 6, 2, 2, 2], [4, 2, 6, 6, 6]]


@pytest.mark.parametrize("is_given", [False, True])
def test_where_nobody_can_say_what_mini_batches_are_like(is_given: bool) -> None:
    mini_batch = {"number": torch.arange(3), "label": torch.arange(3), "text": lambda: 0}

    def rank_main(end: Transport) -> Any:
        with make(end, label="label") as buffer:
            like = {"number": torch.arange(9), "label": torch.arange(9)} if is_given else None
            own = [mini_batch] if end.rank else []
            try:
                for batch in evenly(own, buffer, like=like):
                    buffer.update({"number": batch["number"], "label": batch["label"]})
                    return len(batch["number"])
            except TypeError as error:
                return str(error)

    first, second = on_ranks(2, rank_main)
    if is_given:
        assert (first, second) == (0, 3)
    else:
        assert re.search(
            r"rank 0: evenly: the loader has given nothing, .* let this loader give an empty one",
            first,
        )


@pytest.mark.parametrize("nothing", [[], {"ids": []}], ids=str)
def test_a_first_mini_batch_that_says_nothing_is_refused_on_all_ranks(nothing: Any) -> None:
    texts = [torch.arange(3), torch.arange(5)]

    def rank_main(end: Transport) -> tuple[str, int]:
        arguments = {"selection": "reservoir", "label": None, "capacity_bytes": 9_000}
        with make(end, **arguments) as buffer:
            own = [nothing] if end.rank else [texts]
            with pytest.raises((ValueError, RuntimeError)) as raised:
                for batch in evenly(own, buffer):
                    buffer.update(batch)
            for batch in evenly([texts] * (2 - end.rank), buffer):  # left out it is as good
                buffer.update(batch)
            return str(raised.value), len(buffer)

    first, second = on_ranks(2, rank_main)
    assert first == ("rank 0: evenly failed on rank(s) [1]: see the error there", 6)
    assert second[0].startswith(f"rank 1: evenly: the loader's first mini-batch is {nothing},")


def test_who_learns_from_others_what_samples_are_like_has_not_loaded_them() -> None:
    def rank_main(end: Transport) -> str:
        arguments = {"selection": "reservoir", "label": None, "capacity_bytes": 9_000}
        with make(end, **arguments) as buffer:
            own = [] if end.rank else [[torch.arange(3), torch.arange(5)]]
            for batch in evenly(own, buffer):
                buffer.update(batch)
            with pytest.raises((TypeError, ValueError)) as raised:
                buffer.update({"x": torch.rand(3)})
            return str(raised.value)

    assert not any("was loaded" in message for message in on_ranks(2, rank_main))


def test_ranks_that_do_not_update_equally_often_are_told() -> None:
    def rank_main(end: Transport) -> str:
        with pytest.raises(PeerLostError) as raised, make(end) as buffer:
            for batch in evenly(stream(end.rank, 4), buffer):
                if end.rank == 0:
                    buffer.update(batch)
        return str(raised.value)

    updating, other = on_ranks(2, rank_main)
    assert "rank(s) [1] are in evenly, and this one in a round" in updating
    assert "rank(s) [0] are in a round: all ranks must call update equally often" in other


def test_it_is_for_an_open_buffer() -> None:
    buffer = RehearsalBuffer(20, num_representatives=2)
    steps = iter(evenly(stream(0, 4), buffer))
    buffer.update(next(steps))
    buffer.close()
    with pytest.raises(ritornello.BufferClosedError, match=r"evenly after close\(\)"):
        next(steps)


def test_a_save_inside_the_loop_of_rehearse_meets_no_other_call(tmp_path: Any) -> None:
    """Ranks talk in the trainer's thread alone: a step ahead they would do it in any order."""
    talking = []

    def rank_main(end: Transport) -> int:
        with make(end) as buffer:
            act = buffer._steps.with_peers

            def noted(*arguments: Any) -> Any:
                talking.append(threading.current_thread() is thread)
                return act(*arguments)

            thread = threading.current_thread()
            buffer._steps.with_peers = noted
            steps = ritornello.rehearse(evenly(stream(end.rank, 2 + end.rank), buffer), buffer)
            for _ in steps:
                buffer.save(tmp_path)
        return len(buffer.stats().held_per_rank)

    assert on_ranks(2, rank_main) == [2, 2]
    assert all(talking)
    assert len(talking) == 2 * (4 + 3)


class Stateful:
    """A loader that knows where it is, as torchdata's."""

    def __init__(self, rank: int, num_steps: int) -> None:
        self._rank, self._num_steps, self._step = rank, num_steps, 0

    def __iter__(self) -> Iterator[Sample]:
        batches = list(stream(self._rank, self._num_steps))
        while self._step < self._num_steps:
            self._step += 1
            yield batches[self._step - 1]

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step = state["step"]


def test_the_state_of_a_loader_is_that_of_the_mini_batch_that_the_loop_has() -> None:
    def rank_main(end: Transport) -> list[int]:
        with make(end) as buffer:
            even = evenly(Stateful(end.rank, 1 + 2 * end.rank), buffer)
            steps = ritornello.rehearse(even, buffer)
            return [steps.state_dict()["step"] for _ in steps]

    assert on_ranks(2, rank_main) == [[1, 1, 1], [1, 2, 3]]


def _trained(rank: int) -> Any:
    """Loss and gradient of two unequal ranks in DDP, and of all their samples at once."""
    torch.manual_seed(0)
    model, alone = nn.Linear(1, 3), nn.Linear(1, 3)
    alone.load_state_dict(model.state_dict())
    parallel = DistributedDataParallel(model)
    found = []
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        for batch in evenly(stream(rank, 1 + 2 * rank), buffer):
            numbers, labels = buffer.update(batch)
            size = torch.tensor(len(numbers))
            dist.all_reduce(size)
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, (numbers, labels))
            losses = nn.functional.cross_entropy(
                parallel(numbers[:, None] / 1000), labels, reduction="none"
            )
            parallel.zero_grad()
            (losses.sum() * 2 / size).backward()
            numbers, labels = (torch.cat(each) for each in zip(*everyone, strict=True))
            alone.zero_grad()
            nn.functional.cross_entropy(alone(numbers[:, None] / 1000), labels).backward()
            assert model.weight.grad is not None
            torch.testing.assert_close(model.weight.grad, alone.weight.grad)
            found.append(len(losses))
    return found


@pytest.mark.slow
def test_gradients_in_ddp_are_those_of_all_samples() -> None:
    """A rank without data trains on past samples alone; where there are none, on nothing."""
    assert spawn_ranks(2, _trained) == [[4, 2, 2], [4, 6, 6]]
