from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ritornello
from ritornello import ComposedSteps, RehearsalBuffer, RoundError
from ritornello.testing import connect_shared_memory, run_ranks
from ritornello.transports import Transport


def loader(num_steps: int = 20) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(num_steps):
        numbers = step * 10 + torch.arange(6)
        yield numbers, numbers % 3


def test_it_gives_what_the_plain_loop_gives() -> None:
    def plain(end: Transport) -> list[torch.Tensor]:
        with RehearsalBuffer(12, num_representatives=2, transport=end) as buffer:
            return [buffer.update(batch)[0] for batch in loader()]

    def ahead(end: Transport) -> list[torch.Tensor]:
        with RehearsalBuffer(12, num_representatives=2, transport=end) as buffer:
            return [numbers for numbers, _ in ritornello.rehearse(loader(), buffer, device="cpu")]

    for ours, theirs in zip(
        run_ranks(connect_shared_memory(2), plain),
        run_ranks(connect_shared_memory(2), ahead),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_how_many_are_past_is_of_the_mini_batch_that_the_loop_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = [1, 0, 2.5, 3, 0.25, 2]
    batches = [*loader(5), (torch.arange(2), torch.arange(2))]  # the last one is short
    prepared = threading.Semaphore(0)  # counts mini-batches but the first

    def run(steps: Iterator[tuple[torch.Tensor, torch.Tensor]], buffer: RehearsalBuffer) -> Any:
        found = []
        for step, (numbers, _) in enumerate(steps):
            buffer.num_representatives = rates[step]  # of the next mini-batch but one
            if step + 1 < len(batches):
                assert prepared.acquire(timeout=30.0)  # the next one is joined
            assert buffer.num_past == len(numbers) - len(batches[step][0])
            found.append(numbers)
        assert buffer.num_past == len(numbers) - 2
        return found

    def make() -> RehearsalBuffer:
        return RehearsalBuffer(12, num_representatives=2, most_representatives=3)

    with make() as plain, make() as ahead:
        prepare, calls = ahead._steps.prepare, count()

        def prepare_and_tell(*arguments: Any, **others: Any) -> Any:
            joined = prepare(*arguments, **others)
            if next(calls):
                prepared.release()
            return joined

        monkeypatch.setattr(ahead._steps, "prepare", prepare_and_tell)
        theirs = run(ritornello.rehearse(batches, ahead), ahead)
        prepared.release(len(batches))
        ours = run((plain.update(batch) for batch in batches), plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [len(numbers) - 6 for numbers in ours[:4]] == [0, 2, 1, 0]


@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_mask_says_which_are_past(num_draws: int) -> None:
    batches = [*loader(5), (torch.arange(2), torch.arange(2)), (torch.arange(0), torch.arange(0))]

    def make() -> RehearsalBuffer:
        return RehearsalBuffer(12, num_representatives=2, num_draws=num_draws)

    expected = [
        [False] * len(numbers) + [True] * (2 * num_draws if step else 0)
        for step, (numbers, _) in enumerate(batches)
    ]
    with make() as plain, make() as ahead, make() as further:
        assert plain.past_mask.tolist() == []
        for batch, mask in zip(batches, expected, strict=True):
            assert len(plain.update(batch)[0]) == len(mask)
            assert plain.past_mask.dtype == torch.bool
            assert plain.past_mask.tolist() == mask
        plain.draw()
        assert plain.past_mask.tolist() == [True] * 2 * num_draws
        found = []
        for (numbers, _), mask in ritornello.rehearse(batches, ahead, with_mask=True):
            assert len(numbers) == len(mask)
            assert torch.equal(mask, ahead.past_mask)
            found.append(mask.tolist())
        assert found == expected
        # A trainer that takes all ahead of time.
        taken = list(ritornello.rehearse(batches, further, with_mask=True))
        assert [mask.tolist() for _, mask in taken] == expected


@pytest.mark.accelerator
def test_the_mask_is_where_mini_batches_are(accelerator: str) -> None:
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        steps = ritornello.rehearse(loader(4), buffer, device=accelerator, with_mask=True)
        for step, ((numbers, _), mask) in enumerate(steps):
            assert mask.device == numbers.device
            assert mask.tolist() == [False] * 6 + [True] * (2 if step else 0)


# Loaders that have a state.


class StatefulLoader:
    """Numbers from 0 on; goes on where its state says. The state is changed in place."""

    def __init__(self, num_steps: int = 8) -> None:
        self.num_steps = num_steps
        self.state = {"epoch": 0, "position": 0}

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while self.state["position"] < self.num_steps:
            number = 10 * self.num_steps * self.state["epoch"] + 10 * self.state["position"]
            self.state["position"] += 1
            yield number + torch.arange(6), torch.arange(6) % 3
        self.state |= {"epoch": self.state["epoch"] + 1, "position": 0}

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state.update(state)


def trained_on(loader: Any, buffer: RehearsalBuffer, num_epochs: int = 2) -> Iterator[Any]:
    """Number of the mini-batch, what the loop holds, for each step of some epochs."""
    while loader.state["epoch"] < num_epochs:
        steps = ritornello.rehearse(loader, buffer)
        for numbers, _ in steps:
            yield int(numbers[0]), steps
        yield None, steps


@pytest.mark.parametrize("num_before", [1, 2, 7, 8, 9, 12, 16, 18])
def test_resumed_it_trains_on_each_mini_batch_once(num_before: int) -> None:
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        everything = [number for number, _ in trained_on(StatefulLoader(), buffer)]
        assert [number for number in everything if number is not None] == list(range(0, 160, 10))
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        for num_got, (_, steps) in enumerate(trained_on(StatefulLoader(), buffer), 1):
            if num_got == num_before:
                state = steps.state_dict()
                break
        steps.close()
        kept = dict(state)
        again = StatefulLoader()
        ritornello.rehearse(again, buffer).load_state_dict(state)
        rest = [number for number, _ in trained_on(again, buffer)]
    assert state == kept
    numbers = everything[:num_before] + rest
    assert [number for number in numbers if number is not None] == list(range(0, 160, 10))


def test_before_the_first_mini_batch_the_state_is_the_loaders_own() -> None:
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        steps: Any = ritornello.rehearse(StatefulLoader(), buffer)
        assert steps.state_dict() == {"epoch": 0, "position": 0}
        steps.load_state_dict({"epoch": 0, "position": 5})
        assert steps.state_dict()["position"] == 5
        assert int(next(steps)[0][0]) == 50
        assert steps.state_dict()["position"] == 6
        with pytest.raises(RuntimeError, match="load_state_dict comes before the first mini-batch"):
            steps.load_state_dict({"epoch": 0, "position": 0})
        steps.close()


def test_a_loader_without_a_state() -> None:
    class Wrapper(list[Any]):
        """As Accelerate's, which have the methods whatever they wrap."""

        def state_dict(self) -> Any:
            raise AttributeError("the wrapped loader has no state_dict")

        def load_state_dict(self, state: Any) -> None:
            raise AttributeError("the wrapped loader has no load_state_dict")

    with RehearsalBuffer(12, num_representatives=2) as buffer:
        steps: Any = ritornello.rehearse(list(loader(2)), buffer)
        assert not hasattr(steps, "state_dict")
        assert len(list(steps)) == 2
        steps = ritornello.rehearse(Wrapper(loader(3)), buffer)
        assert len(list(steps)) == 3
        with pytest.raises(AttributeError, match="the wrapped loader has no state_dict"):
            steps.state_dict()


def test_a_loop_left_early_has_offered_what_it_trained_on() -> None:
    def make() -> RehearsalBuffer:
        return RehearsalBuffer(12, num_representatives=2, num_candidates=3)

    batches = list(loader())
    with make() as plain, make() as buffer:
        for batch in batches[:5]:
            plain.update(batch)
        for step, _ in enumerate(ritornello.rehearse(batches, buffer)):
            if step == 4:
                break
        for batch in batches[5:]:  # both go on alike
            assert torch.equal(plain.update(batch)[0], buffer.update(batch)[0])


def test_what_is_saved_inside_the_loop_is_what_the_trainer_has_got(tmp_path: Path) -> None:
    batches = list(loader())
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        rest = []
        for step, batch in enumerate(ritornello.rehearse(batches, buffer)):
            if step == 6:
                buffer.save(tmp_path)
            if step > 6:
                rest.append(batch[0])
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        buffer.load(tmp_path)
        again = [numbers for numbers, _ in ritornello.rehearse(batches[7:], buffer)]
    assert all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))


def test_errors_of_the_loader_and_of_the_buffer_reach_the_trainer() -> None:
    def broken() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from loader(3)
        raise OSError("the disk is gone")

    with RehearsalBuffer(12, num_representatives=2) as buffer:
        with pytest.raises(OSError, match="the disk is gone"):
            for _ in ritornello.rehearse(broken(), buffer):
                pass
        with pytest.raises(ValueError, match="dtype and shape are fixed"):
            for _ in ritornello.rehearse([(torch.zeros(2), torch.arange(2))], buffer):
                pass


def test_a_failed_round_ends_the_loop() -> None:
    buffer = RehearsalBuffer(2**40, num_representatives=2, label=None, selection="fifo")
    with buffer, pytest.raises(RoundError, match="GB"):
        for _ in ritornello.rehearse([torch.zeros(2, 2**16)] * 5, buffer):
            pass


def test_stats_may_be_asked_for_in_the_loop() -> None:
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        for _ in ritornello.rehearse(loader(200), buffer):
            len(buffer)
            buffer.stats(per_class=False)


def test_what_is_no_tensor_is_refused_by_name() -> None:
    with RehearsalBuffer(12, num_representatives=2) as buffer:
        batch = (torch.zeros(2), torch.arange(2), ["a.png", "b.png"])
        with pytest.raises(TypeError, match=r"batch\[2\]\[0\] is a str"):
            next(ritornello.rehearse([batch], buffer, device="cpu"))


def test_how_many_are_drawn_follows_the_composition() -> None:
    def composed() -> DataLoader[Any]:
        data = TensorDataset(torch.arange(60), torch.arange(60) % 3)
        steps = ComposedSteps(60, 180, samples_per_step=6, num_epochs=2, first_share=0.9)
        return DataLoader(data, batch_sampler=steps)

    def make() -> RehearsalBuffer:
        buffer = RehearsalBuffer(40, num_representatives=0, most_representatives=6)
        buffer.update((torch.arange(60, 100), torch.arange(40) % 3))
        return buffer

    def plain() -> list[torch.Tensor]:
        loader, found = composed(), []
        assert isinstance(loader.batch_sampler, ComposedSteps)
        with make() as buffer:
            for _ in range(2):
                for step, batch in enumerate(loader):
                    buffer.num_representatives = loader.batch_sampler.num_past(step + 1)
                    found.append(buffer.update(batch)[0])
        return found

    loader, ours = composed(), []
    with make() as buffer:
        for _ in range(2):
            for numbers, _ in ritornello.rehearse(loader, buffer):
                ours.append(numbers)
                assert len(numbers) == 6 or len(ours) == 1
    assert len(ours) == 20
    assert all(torch.equal(a, b) for a, b in zip(ours, plain(), strict=True))


def test_a_rate_that_cannot_follow_the_composition() -> None:
    data = TensorDataset(torch.arange(60), torch.arange(60) % 3)
    loader = DataLoader(data, batch_sampler=ComposedSteps(60, 180, samples_per_step=6))
    with (
        RehearsalBuffer(40, num_representatives=2) as buffer,
        pytest.raises(ValueError, match="the buffer was made without most_representatives"),
    ):
        next(ritornello.rehearse(loader, buffer))
