"""Streams: whoever uses what on whichever stream, everything comes as on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_batches import (
    ARGUMENTS,
    Batch,
    augmented,
    batches,
    new_stream,
    pinned,
    rehearsed,
    same,
    stored,
)
from torch import Tensor

import ritornello
import simulated
from ritornello import RehearsalBuffer
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(
        simulated.REAL is not None and simulated.REAL.type == "mps", reason="MPS has one stream"
    ),
]

PLACES = ("cpu", "accelerator")
"""Where the shard lies."""


def on_both(
    accelerator: str, place: str, run: Callable[[str, str], list[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same on the CPU and on the device; ``run`` gets the trainer's and the shard's."""
    return run("cpu", "cpu"), run(accelerator, accelerator if place == "accelerator" else place)


def test_mini_batches_may_move_to_the_device_later(
    accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their candidates are chosen where they are stored from: a device wants both on one."""
    select = Tensor.index_select

    def on_one_device(values: Tensor, dim: int, index: Tensor) -> Tensor:
        assert values.device == index.device
        return select(values, dim, index)

    monkeypatch.setattr(Tensor, "index_select", on_one_device)

    def run(device: str) -> list[Tensor]:
        with RehearsalBuffer(20, num_representatives=4, num_candidates=8, seed=1) as buffer:
            return [
                buffer.update((values.to(place), values.to(place) % 5))[0].cpu()
                for step in range(10)
                for values in [torch.arange(16 * step, 16 * step + 16)]
                for place in ["cpu" if step < 5 else device]
            ]

    found, expected = run(accelerator), run("cpu")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class LoaderOnTheDevice:
    """Puts mini-batches on the device itself, and keeps something there, as many loaders do."""

    def __init__(self, accelerator: str, num_steps: int = 40) -> None:
        self.accelerator, self.num_steps = accelerator, num_steps
        self.num_seen = torch.zeros((), dtype=torch.int64, device=accelerator)

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in pinned(batches("cpu", self.num_steps)):
            self.num_seen += len(labels)
            yield (
                images.to(self.accelerator, non_blocking=True),
                labels.to(self.accelerator, non_blocking=True),
            )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("where", ["on it", "not said"])
def test_a_loader_that_puts_mini_batches_on_the_device(
    accelerator: str, place: str, own_stream: bool, where: str
) -> None:
    storage = accelerator if place == "accelerator" else place
    with (
        new_stream(accelerator) if own_stream else nullcontext(),
        RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer,
    ):
        loader = LoaderOnTheDevice(accelerator)
        got = rehearsed(loader, accelerator if where == "on it" else None, buffer)
        assert int(loader.num_seen) == 16 * 40
        assert same(augmented("cpu"), got)


@pytest.mark.parametrize("own_stream", [False, True])
def test_mini_batches_that_the_trainer_makes_on_the_device(
    accelerator: str, own_stream: bool
) -> None:
    """Also in the middle of the loop, and let go before they are used."""
    with (
        new_stream(accelerator) if own_stream else nullcontext(),
        RehearsalBuffer(60, **ARGUMENTS) as buffer,
    ):
        made: list[Batch] = []

        def make(images: Tensor, labels: Tensor) -> None:
            # Not by a copy from the host, which would be waited for.
            made.append((torch.zeros_like(images) + images, torch.zeros_like(labels) + labels))

        def loader() -> Iterator[Batch]:
            while made:
                yield made.pop(0)

        stream = batches(accelerator)
        make(*stream[0])
        make(*stream[1])
        got = []
        for step, joined in enumerate(ritornello.rehearse(loader(), buffer, accelerator)):
            got += [leaf.clone() for leaf in joined]
            # While the next one is prepared; it is for the one after that.
            if step + 2 < len(stream):
                make(*stream[step + 2])
        assert same(augmented("cpu")[: len(got)], got)
        assert len(got) >= 2 * 2


@pytest.mark.parametrize("place", PLACES)
def test_mini_batches_that_the_loop_holds_longer(accelerator: str, place: str) -> None:
    """One is used, and let go, just before the next but one is placed on the device."""
    storage = accelerator if place == "accelerator" else place
    may_go_on = threading.Semaphore(0)

    def loader() -> Iterator[Batch]:
        for number, batch in enumerate(pinned(batches("cpu", 12))):
            assert number < 2 or may_go_on.acquire(timeout=60)
            yield batch

    got, held = [], None
    with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
        for joined in ritornello.rehearse(loader(), buffer, accelerator):
            got += [leaf.clone() for leaf in joined]
            is_first = held is None
            if not is_first:
                held.zero_()
            held = joined[0]
            del joined
            if not is_first:
                may_go_on.release()
        assert same(augmented("cpu", 12), got)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("goes_on_with", ["rehearse", "update"])
def test_rehearse_left_early(accelerator: str, place: str, goes_on_with: str) -> None:
    """What was prepared and dropped must not be written where the next one is."""

    def run(device: str, storage: str) -> list[Tensor]:
        out, stream = [], batches("cpu", 60)
        stream = stream if device == "cpu" else pinned(stream)
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for first in range(0, 60, 10):
                part = stream[first : first + 10]
                if goes_on_with == "update" and first % 20:
                    for batch in part[:5]:
                        joined = buffer.update([leaf.to(device) for leaf in batch])
                        out += [leaf.clone() for leaf in joined]
                else:
                    out += rehearsed(part, device, buffer, num_steps=5)
        return out

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("place", PLACES)
def test_several_epochs_each_with_its_own_rehearse(accelerator: str, place: str) -> None:
    storage, stream = accelerator if place == "accelerator" else place, pinned(batches("cpu"))
    with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
        got = [
            leaf
            for first in range(0, 40, 10)
            for leaf in rehearsed(stream[first : first + 10], accelerator, buffer)
        ]
    assert same(augmented("cpu"), got)


def test_a_loader_that_ends_early_has_done_what_it_did(accelerator: str) -> None:
    """What the loader keeps on the device can be used after the loop, also if that was left."""
    loader = LoaderOnTheDevice(accelerator)
    with RehearsalBuffer(60, **ARGUMENTS) as buffer:
        rehearsed(loader, accelerator, buffer, num_steps=5)
        doubled = loader.num_seen * 2
    assert int(doubled) == 2 * 16 * 6  # one was prepared in vain


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("saved_on", ["cpu", "accelerator"])
def test_load_then_rehearse(accelerator: str, place: str, saved_on: str, tmp_path: Path) -> None:
    """Also when the saved buffer's mini-batches were elsewhere."""
    storage, stream = accelerator if place == "accelerator" else place, batches("cpu")
    with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
        for images, labels in stream[:21]:
            device = accelerator if saved_on == "accelerator" else "cpu"
            buffer.update((images.to(device), labels.to(device)))
        buffer.save(tmp_path)
    with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
        buffer.load(tmp_path)
        got = rehearsed(pinned(stream[21:]), accelerator, buffer)
    assert same(augmented("cpu")[42:], got)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("saved_on", ["cpu", "accelerator"])
def test_what_is_there_right_after_a_load(
    accelerator: str, place: str, saved_on: str, tmp_path: Path
) -> None:
    def run(device: str, storage: str) -> list[Tensor]:
        where = tmp_path / device
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for images, labels in batches("cpu", 12):
                place_of_it = device if saved_on == "accelerator" else "cpu"
                buffer.update((images.to(place_of_it), labels.to(place_of_it)))
            buffer.save(where)
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            buffer.load(where)
            found = stored(buffer)
            with new_stream(device) if device != "cpu" else nullcontext():
                for images, labels in buffer.representatives(16):
                    found += [images.cpu(), labels.cpu()]
                return found + [leaf.cpu() for leaf in buffer.draw()]

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("place", PLACES)
def test_load_then_draw_on_another_stream(accelerator: str, place: str, tmp_path: Path) -> None:
    def run(device: str, storage: str) -> list[Tensor]:
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for batch in batches(device, 12):
                buffer.update(batch)
            buffer.save(tmp_path / device)
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            buffer.load(tmp_path / device)
            with new_stream(device) if device != "cpu" else nullcontext():
                return [leaf.cpu() for leaf in buffer.draw()]

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("calls", ["update", "draw and offer"])
def test_streams_in_turn(accelerator: str, place: str, calls: str) -> None:
    """A trainer that changes its stream between steps, or between draw and offer."""

    def run(device: str, storage: str) -> list[Tensor]:
        out = []
        streams = [
            nullcontext if device == "cpu" else lambda each=each: on_stream(each)
            for each in (streams_of(accelerator) if device != "cpu" else (None, None))
        ]
        stream = batches(device)
        if device != "cpu":
            torch.accelerator.synchronize()
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for step, batch in enumerate(stream):
                if calls == "update":
                    with streams[step % 2]():
                        out += [leaf.clone() for leaf in buffer.update(batch)]
                    continue
                with streams[0]():
                    out += [leaf.clone() for leaf in buffer.draw() or ()]
                with streams[1]():
                    buffer.offer(batch)
        if device != "cpu":
            torch.accelerator.synchronize()
        return [leaf.cpu() for leaf in out]

    assert same(*on_both(accelerator, place, run))


def streams_of(accelerator: str) -> tuple[Any, Any]:
    module = torch.get_device_module(accelerator)
    return module.Stream(accelerator), module.Stream(accelerator)


def on_stream(stream: Any) -> Any:
    return torch.get_device_module(stream.device).stream(stream)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["rehearse", "update"])
def test_mini_batches_that_grow(accelerator: str, place: str, how: str) -> None:
    """Staging memory is replaced while other streams still use it; a state is taken meanwhile."""

    def run(device: str, storage: str) -> list[Tensor]:
        out, stream = [], batches("cpu", 30, first_size=4, growth=1)
        stream = stream if device == "cpu" else pinned(stream)
        arguments = ARGUMENTS | {"num_candidates": None, "storage": storage}
        with RehearsalBuffer(60, **arguments) as buffer:
            if how == "rehearse":
                for joined in ritornello.rehearse(stream, buffer, device):
                    out += [leaf.clone() for leaf in joined]
                    out += stored(buffer)
            else:
                for batch in stream:
                    out += [leaf.clone() for leaf in buffer.update([x.to(device) for x in batch])]
        return out

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("trainer", PLACES)
@pytest.mark.parametrize("place", PLACES)
def test_memory_of_a_closed_buffer(accelerator: str, trainer: str, place: str) -> None:
    """It comes again at once, also when the last round's copies are under way."""

    def run(device: str, storage: str) -> list[Tensor]:
        out: list[Tensor] = []
        for number in range(3):
            with new_stream(accelerator) if device != "cpu" and number else nullcontext():
                with RehearsalBuffer(60, num_representatives=7, storage=storage) as buffer:
                    for batch in batches(device, 8):
                        out += [leaf.clone() for leaf in buffer.update(batch)]
                del buffer
                for num_rows in (7, 16, 23, 60):  # as large as what was freed
                    size = num_rows * 208
                    for _ in range(3):
                        out.append(torch.full((size,), num_rows, dtype=torch.uint8, device=device))
                out = [leaf.cpu() for leaf in out]
        return out

    device = accelerator if trainer == "accelerator" else "cpu"
    expected = run("cpu", "cpu")
    assert same(expected, run(device, accelerator if place == "accelerator" else "cpu"))


@pytest.mark.parametrize("place", PLACES)
def test_a_trainer_that_ends_on_another_stream(accelerator: str, place: str) -> None:
    """The last use of staging memory may be on a stream that it was not made on."""
    storage = accelerator if place == "accelerator" else place
    first, second = streams_of(accelerator)
    expected, stream = augmented("cpu", 9), batches(accelerator, 9)
    torch.accelerator.synchronize()
    with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
        with on_stream(first):
            got = [leaf.clone() for batch in stream[:8] for leaf in buffer.update(batch)]
        with on_stream(second):
            got += [leaf.clone() for leaf in buffer.update(stream[8])]
    del buffer
    with on_stream(first):  # is given what was freed
        for num_rows in (7, 5, 16):
            torch.full((num_rows, 208), 1, dtype=torch.uint8, device=accelerator)
    torch.accelerator.synchronize()
    assert same(expected, got)


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_was_used_in_vain(accelerator: str, place: str) -> None:
    """No round follows a preparation that is dropped: its stream's use must be known all the same."""
    storage = accelerator if place == "accelerator" else place
    first, second = streams_of(accelerator)
    stream = batches(accelerator, 4)
    torch.accelerator.synchronize()
    with RehearsalBuffer(60, num_representatives=7, storage=storage) as buffer:
        with on_stream(first):
            for batch in stream:
                buffer.update(batch)
        with on_stream(second):
            rehearsed(pinned(batches("cpu", 4)), accelerator, buffer, num_steps=1)
    del buffer
    made = []
    with on_stream(first):  # is given what was freed
        for _ in range(8):
            made.append(torch.full((16, 208), 1, dtype=torch.uint8, device=accelerator))
    torch.accelerator.synchronize()
    assert all((each == 1).all() for each in made)


@pytest.mark.parametrize("place", PLACES)
def test_saves_inside_rehearse(accelerator: str, place: str, tmp_path: Path) -> None:
    def run(device: str, storage: str) -> list[Tensor]:
        out, stream = [], batches("cpu")
        stream = stream if device == "cpu" else pinned(stream)
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for step, joined in enumerate(ritornello.rehearse(stream, buffer, device)):
                out += [leaf.clone() for leaf in joined]
                if step % 7 == 6:
                    out += stored(buffer)
                if step % 15 == 14:
                    buffer.save(tmp_path / device, background=step == 29)
            buffer.wait_until_saved()
        with RehearsalBuffer(60, num_representatives=7) as buffer:
            buffer.load(tmp_path / device)
            return out + stored(buffer)

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("place", PLACES)
def test_forgetting_between_saves(accelerator: str, place: str, tmp_path: Path) -> None:
    def run(device: str, storage: str) -> list[Tensor]:
        stream = batches(device)
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for batch in stream[:20]:
                buffer.update(batch)
            buffer.save(tmp_path / device)
        ritornello.forget(tmp_path / device, {"label": 3})
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            buffer.load(tmp_path / device)
            return [leaf.clone() for batch in stream[20:] for leaf in buffer.update(batch)]

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("place", PLACES)
def test_two_buffers_side_by_side(accelerator: str, place: str) -> None:
    def run(device: str, storage: str) -> list[Tensor]:
        out = []
        with (
            RehearsalBuffer(60, **ARGUMENTS, storage=storage) as one,
            RehearsalBuffer(30, **ARGUMENTS, storage=storage, seed=1) as other,
        ):
            for batch in batches(device):
                joined = one.update(batch)
                out += [leaf.clone() for leaf in other.update((joined[0], joined[1]))]
        return out

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_draws_nothing(accelerator: str, place: str) -> None:
    """With few representatives for many ranks, rounds end with nothing for some of them."""
    num_ranks = 4

    def run(device: str, storage: str) -> list[Tensor]:
        def play(transport: Any) -> list[Tensor]:
            out = []
            arguments = {"num_representatives": 1, "storage": storage, "transport": transport}
            with RehearsalBuffer(num_ranks, **arguments) as buffer:
                for step, (images, labels) in enumerate(batches(device, 20, first_size=1)):
                    has_any = transport.rank == step % 2  # and two ranks never have
                    batch = images[: int(has_any)], labels[: int(has_any)]
                    out += [leaf.clone() for leaf in buffer.update(batch)]
                    out += stored(buffer)
            return [leaf.cpu() for leaf in out]

        per_rank = run_ranks(LocalTransport.connect(num_ranks), play)
        return [leaf for of_rank in per_rank for leaf in of_rank]

    assert same(*on_both(accelerator, place, run))


@pytest.mark.parametrize("place", PLACES)
def test_ranks_that_are_threads(accelerator: str, place: str) -> None:
    """They pass each other tensors that are not complete yet."""

    def run(device: str, storage: str) -> list[Tensor]:
        def play(transport: Any) -> list[Tensor]:
            return augmented(device, storage=storage, transport=transport)

        return [leaf for of_rank in run_ranks(LocalTransport.connect(3), play) for leaf in of_rank]

    assert same(*on_both(accelerator, place, run))


@pytest.mark.skipif(simulated.REAL is not None, reason="plays MPS on the simulated device")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_draws", [1, 2])
def test_a_device_with_one_stream(
    place: str, num_draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MPS: no stream of the buffer's own, and no copy that nobody waits for."""
    monkeypatch.setattr("ritornello.records.accelerators.WITHOUT_STREAMS", {"cpu", "sim"})
    with simulated.accelerator("lazy", late_pageable_copies=True) as name:
        storage = name if place == "accelerator" else place
        arguments = ARGUMENTS | {"num_draws": num_draws, "storage": storage}
        with RehearsalBuffer(60, **arguments) as buffer:
            got = rehearsed(batches("cpu"), name, buffer)
        assert same(augmented("cpu", num_draws=num_draws), got)


@pytest.mark.skipif(simulated.REAL is not None, reason="says when memory is read")
@pytest.mark.parametrize("trainer", PLACES)
@pytest.mark.parametrize("place", PLACES)
def test_copies_of_memory_that_is_given_away_at_once(trainer: str, place: str) -> None:
    """No device need have read ordinary memory when a copy that nobody waits for returns."""
    for schedule in ("lazy", "random-1"):
        with simulated.accelerator(schedule, late_pageable_copies=True) as name:
            arguments = {"num_draws": 2, "storage": name if place == "accelerator" else place}
            got = augmented(name if trainer == "accelerator" else "cpu", **arguments)
            assert same(augmented("cpu", num_draws=2), got)
