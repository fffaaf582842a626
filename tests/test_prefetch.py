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

        def prepare_and_tell(*arguments: Any) -> Any:
            joined = prepare(*arguments)
            if next(calls):
                prepared.release()
            return joined

        monkeypatch.setattr(ahead._steps, "prepare", prepare_and_tell)
        theirs = run(ritornello.rehearse(batches, ahead), ahead)
        prepared.release(len(batches))
        ours = run((plain.update(batch) for batch in batches), plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [len(numbers) - 6 for numbers in ours[:4]] == [0, 2, 1, 0]


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
