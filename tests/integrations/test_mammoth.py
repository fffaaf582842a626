from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def make_buffer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes the example's buffers, and closes them."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from mammoth_buffer import Buffer

    made = []

    def make(*arguments: Any, **settings: Any) -> Any:
        made.append(Buffer(*arguments, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Four examples whose values say which they are, and their labels."""
    labels = torch.arange(4 * number, 4 * number + 4)
    return labels.float().repeat(3, 1).T.contiguous(), labels


def test_the_calls_of_experience_replay(make_buffer: Callable[..., Any]) -> None:
    buffer = make_buffer(20, minibatch_size=6)
    sizes = []
    for number in range(8):
        images, labels = batch(number)
        if not buffer.is_empty():
            past_images, past_labels = buffer.get_data(6)
            assert (past_images == past_labels.float()[:, None]).all()
            assert past_labels.max() < 4 * number
            assert past_labels.dtype == torch.int64
            sizes.append(len(past_labels))
        else:
            assert number == 0
        buffer.add_data(examples=images, labels=labels)
    assert sizes == [4, 6, 6, 6, 6, 6, 6]
    assert len(buffer) == buffer.buffer_size == 20


def test_all_fields_come_back_in_mammoths_order(make_buffer: Callable[..., Any]) -> None:
    buffer = make_buffer(20, minibatch_size=4, num_draws=2)
    images, labels = batch(0)
    buffer.add_data(images, task_labels=labels + 100, logits=images * 2, labels=labels)
    draws = [buffer.get_data(4, transform=lambda image: image + 0.5) for _ in range(2)]
    for past_images, past_labels, past_logits, past_tasks in draws:
        assert (past_images == past_labels.float()[:, None] + 0.5).all()
        assert (past_logits == past_labels.float()[:, None] * 2).all()
        assert (past_tasks == past_labels + 100).all()


def test_der_stores_no_labels(make_buffer: Callable[..., Any]) -> None:
    buffer = make_buffer(20, minibatch_size=4)
    images, _ = batch(0)
    buffer.add_data(images, logits=images * 2)
    past_images, past_logits = buffer.get_data(4, device="cpu")
    assert (past_logits == past_images * 2).all()


def test_classes_can_have_equal_shares(make_buffer: Callable[..., Any]) -> None:
    buffer = make_buffer(8, minibatch_size=8, selection="class-balanced")
    images, labels = batch(0)
    for label in [1] * 10 + [2]:
        buffer.add_data(images, labels=torch.full_like(labels, label))
    _, past_labels = buffer.get_data(8)
    assert past_labels.sort().values.tolist() == [1] * 4 + [2] * 4


def test_what_was_not_drawn_is_dropped(make_buffer: Callable[..., Any]) -> None:
    """A model such as er_ace draws from the second task on."""
    buffer = make_buffer(20, minibatch_size=4)
    for number in range(3):
        buffer.add_data(*batch(number))
    assert not buffer.is_empty()
    assert len(buffer.get_data(4)[1]) == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda buffer: buffer.get_data(5), ValueError, r"get_data\(5\).*minibatch_size=4"),
        (lambda buffer: buffer.get_data(4, return_index=True), ValueError, "return_index"),
        (lambda buffer: buffer.get_data(4, mask_task_out=1), ValueError, "mask_task_out"),
        (
            lambda buffer: [buffer.get_data(4) for _ in range(2)],
            RuntimeError,
            "had its num_draws=1; call add_data once in every step",
        ),
        (lambda buffer: buffer.add_data(batch(1)[0]), ValueError, "labels"),
    ],
)
def test_messages(
    call: Callable[[Any], object],
    error: type[Exception],
    message: str,
    make_buffer: Callable[..., Any],
) -> None:
    buffer = make_buffer(20, minibatch_size=4)
    with pytest.raises(RuntimeError, match="the buffer is empty; ask is_empty"):
        buffer.get_data(4)
    buffer.add_data(*batch(0))
    with pytest.raises(error, match=message):
        call(buffer)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("model", ["derpp"])  # er draws as train_ddp_rehearsal.py does
def test_two_ranks(model: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    ran = subprocess.run(
        [*command, "2", str(EXAMPLES / "mammoth_buffer.py"), model],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"average: ([\d.]+) %", ran.stdout)
    assert found, ran.stdout
    assert float(found[1]) > 85.0
