"""PyTorch's modes around the buffer's calls change nothing of what is stored and drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from ritornello import RehearsalBuffer


@contextmanager
def default_device() -> Iterator[None]:
    """As of those who put all on a GPU; nothing can be computed on this one."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "set_default_device": default_device,
    "set_default_dtype": default_dtype,
}


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    values = torch.arange(step * 8, step * 8 + 8, device="cpu")
    return values.repeat(3000, 1).t().float(), values % 3


def run(around: Callable[[], AbstractContextManager[object]], num_draws: int) -> list[Tensor]:
    """All that a buffer gives whose calls are inside a mode, on two steps of three."""
    got = []

    def inside(step: int) -> AbstractContextManager[object]:
        return nullcontext() if step % 3 == 2 else around()

    with inside(0):
        buffer = RehearsalBuffer(
            12, num_representatives=2, num_draws=num_draws, sampling="grasp", label=1
        )
    with buffer:
        for step in range(7):
            with inside(step):
                got.append(buffer.update(batch_of(step)))
        for step in range(7, 10):
            with inside(step):
                drawn = buffer.draw()
                got.extend(drawn if num_draws > 1 else [drawn])
                buffer.offer(batch_of(step))
        with around():
            got.extend(buffer.representatives())
            buffer.rewrite(lambda batch: batch[0] + 1, fields=0)
            buffer.measure_distances(lambda batch: batch[0][:, :5])
            state = buffer.state_dict()
            buffer.load_state_dict(state)
        got.append(buffer.update(batch_of(10)))
        got.append(buffer.update(batch_of(11)))
    return [tensor for batch in got[1:] for tensor in batch]


@pytest.mark.parametrize("num_draws", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_the_calls_changes_nothing(mode: str, num_draws: int) -> None:
    expected, got = run(nullcontext, num_draws), run(MODES[mode], num_draws)
    assert len(got) == len(expected)
    for each, as_always in zip(got, expected, strict=True):
        assert not each.is_inference()
        assert each.dtype == as_always.dtype
        assert torch.equal(each, as_always)
    images = got[0].requires_grad_()
    nn.Linear(3000, 1)(images).sum().backward()
    assert images.grad is not None


def test_in_inference_mode_no_graph_is_recorded() -> None:
    with RehearsalBuffer(12, num_representatives=2, label=None, selection="fifo") as buffer:
        buffer.update(torch.ones(4))
        batch = torch.ones(4, requires_grad=True)
        assert buffer.update(batch).requires_grad
        with torch.inference_mode():
            assert not buffer.update(batch).requires_grad
