"""A training whose mini-batches do not come through the buffer, or come back without a past."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ritornello import Contents, RehearsalBuffer, SamplingPolicy, rehearse
from ritornello.rounds.watching import MANY_STEPS


def batch_of(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return step + torch.arange(4.0), torch.arange(4) % 2


@pytest.fixture
def step() -> Callable[..., None]:
    """Makes steps of an optimiser."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([parameter], lr=0.1)

    def step(num_steps: int = 1) -> None:
        for _ in range(num_steps):
            parameter.grad = torch.ones(1)
            optimiser.step()

    return step


def test_a_training_that_goes_on_without_the_buffer(
    step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        for number in range(MANY_STEPS):
            buffer.update(batch_of(number))
            step()
        step(MANY_STEPS - 2)
        assert buffer.stats().num_steps_without == MANY_STEPS - 1
        assert not caplog.records
        figures = buffer.stats().figures()
        assert figures["buffer/steps_without"] == MANY_STEPS - 1
        assert figures["buffer/past"] == 2 * (MANY_STEPS - 1) / MANY_STEPS
        step()
        (record,) = caplog.records
        assert "its mini-batches do not come through update, draw or rehearse" in record.message
        step(2 * MANY_STEPS)  # said once
        buffer.update(batch_of())
        assert buffer.stats().num_steps_without == 0
        step(2 * MANY_STEPS)
        assert buffer.stats().num_given == 2 * MANY_STEPS
    assert len(caplog.records) == 1


@pytest.mark.parametrize("use", ["draw", "representatives", "offer"])
def test_whatever_comes_from_the_buffer_counts(
    use: str, step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        for number in range(3):
            buffer.update(batch_of(number))
            step(MANY_STEPS - 1)
            if use == "representatives":
                list(buffer.representatives())
            else:
                buffer.draw()
                step(MANY_STEPS - 1)
                buffer.offer(batch_of(number))
            step(MANY_STEPS - 1)
    step(MANY_STEPS)  # closed
    assert not caplog.records


def test_a_loader_that_a_trainer_makes_anew(
    step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """As to skip what it has trained on before it was stopped."""

    class Rehearsing:
        def __init__(self, loader: DataLoader[Any], buffer: RehearsalBuffer) -> None:
            self.loader, self.buffer = loader, buffer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.loader, name)

        def __iter__(self) -> Iterator[Any]:
            return rehearse(self.loader, self.buffer)

    data = TensorDataset(torch.arange(800.0), torch.arange(800) % 2)
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        loader = Rehearsing(DataLoader(data, batch_size=4), buffer)
        for _ in loader:
            step()
        assert not caplog.records
        for _ in DataLoader(loader.dataset, batch_size=loader.batch_size):
            step()
        assert len(caplog.records) == 1
        assert buffer.stats().num_steps_without == 200 + 1


def test_a_buffer_that_nothing_ever_comes_to(
    step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """As one of a callback that the trainer does not call."""
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        step(MANY_STEPS)
        assert len(caplog.records) == 1
        assert buffer.stats().figures()["buffer/steps_without"] == MANY_STEPS


def test_other_threads_train_on_their_own(
    step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with RehearsalBuffer(20, num_representatives=2):
        other = threading.Thread(target=step, args=(MANY_STEPS,))
        other.start()
        other.join()
    assert not caplog.records


def test_a_compiled_step_is_let_be(
    step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Its graph has no part in it."""
    from ritornello.rounds import watching

    with RehearsalBuffer(20, num_representatives=2) as buffer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watching.torch.compiler, "is_compiling", lambda: True)
            step(MANY_STEPS)
        assert buffer.stats().num_steps_without == 0


# Mini-batches that come through the buffer, and get nothing.


def test_a_rate_that_is_never_set(caplog: pytest.LogCaptureFixture) -> None:
    def run(**arguments: Any) -> None:
        arguments = {"num_representatives": 0, "most_representatives": 4, **arguments}
        with RehearsalBuffer(20, **arguments) as buffer:
            for number in range(2 * MANY_STEPS):
                if is_set:
                    buffer.num_representatives = 0
                buffer.update(batch_of(number))

    is_set = True
    run()
    is_set = False
    run(most_representatives=None)  # it only fills
    assert not caplog.records
    run()
    (record,) = caplog.records
    assert "num_representatives is 0 and was never set" in record.message


class DrawsNothing(SamplingPolicy):
    needs_labels = True

    def num_drawable(self, contents: Contents) -> int:
        return 0

    def draw(self, *given: Any) -> Any:
        return np.zeros((1, 0), dtype=np.int64)


def test_a_policy_that_never_draws(caplog: pytest.LogCaptureFixture) -> None:
    for sampling, rate in ((DrawsNothing(), 0.05), ("uniform", 0.001), (DrawsNothing(), 2)):
        assert not caplog.records
        with RehearsalBuffer(20, num_representatives=rate, sampling=sampling) as buffer:
            for number in range(2 * MANY_STEPS):
                buffer.update(batch_of(number))
    (record,) = caplog.records
    assert "although the buffer holds some: DrawsNothing draws none" in record.message


def test_the_first_task_has_no_earlier_one(caplog: pytest.LogCaptureFixture) -> None:
    with RehearsalBuffer(20, num_representatives=2, sampling="earlier-tasks") as buffer:
        buffer.begin_task("first")
        for number in range(MANY_STEPS + 1):
            buffer.update(batch_of(number))
    assert not caplog.records


@pytest.mark.parametrize("measures", [True, False])
def test_distances_that_are_never_measured(
    measures: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with RehearsalBuffer(20, num_representatives=2, sampling="grasp") as buffer:
        if measures:
            buffer.measure_distances(lambda batch: batch[0][:, None])
        for number in range(2 * MANY_STEPS):
            buffer.update(batch_of(number))
    said = [record.message for record in caplog.records]
    assert len(said) == (not measures)
    assert all("until buffer.measure_distances is called" in each for each in said)
