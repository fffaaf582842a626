from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ritornello import RehearsalBuffer


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mini_batches(num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(num)
    ]


class Compiled:
    """A backend that counts what is compiled."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: Any, _: Any) -> Callable[..., Any]:
        self.num_graphs += 1
        forward: Callable[..., Any] = graph.forward
        return forward


@pytest.mark.parametrize(("dynamic", "num_graphs"), [(None, 2), (True, 1)])
def test_a_compiled_model_meets_few_sizes(dynamic: bool | None, num_graphs: int) -> None:
    """The first mini-batch has no representatives, and while it fills the number grows."""
    backend = Compiled()
    model = torch.compile(nn.Linear(3, 4), backend=backend, dynamic=dynamic)
    sizes = []
    with RehearsalBuffer(50, num_representatives=6, num_candidates=1) as buffer:
        for images, labels in mini_batches(20):
            images, labels = buffer.update((images, labels))
            sizes.append(len(images))
            nn.functional.cross_entropy(model(images), labels).backward()
    assert len(set(sizes)) > 3, sizes
    assert sizes[-1] == 14
    assert backend.num_graphs == num_graphs


def test_inside_a_compiled_step_the_buffer_works_as_outside() -> None:
    backend = Compiled()
    model = nn.Linear(3, 4)
    with (
        RehearsalBuffer(50, num_representatives=6) as buffer,
        RehearsalBuffer(50, num_representatives=6) as reference,
    ):

        def step(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            images, labels = buffer.update((images * 2, labels))
            return images, nn.functional.cross_entropy(model(images), labels)

        def halves(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            past = buffer.draw()
            buffer.offer((images, labels))
            return images if past is None else torch.cat((images, past[0]))

        compiled, compiled_halves = (
            torch.compile(each, backend=backend) for each in (step, halves)
        )
        for images, labels in mini_batches(12):
            augmented, loss = compiled(images, labels)
            loss.backward()
            assert torch.equal(augmented, reference.update((images * 2, labels))[0])
        assert backend.num_graphs <= 4  # before it and after it, without and with representatives
        for images, labels in mini_batches(4):
            augmented = compiled_halves(images, labels)
            assert torch.equal(augmented, reference.update((images, labels))[0])


def test_one_whole_graph_cannot_hold_it() -> None:
    with RehearsalBuffer(50, num_representatives=6) as buffer:
        step = torch.compile(lambda *batch: buffer.update(batch), backend="eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="torch.compiler.disable"):
            step(*mini_batches(1)[0])
