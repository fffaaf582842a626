"""Several devices: in one process, and one for each rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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

import simulated
from ritornello import RehearsalBuffer
from ritornello.testing import spawn_ranks
from ritornello.transports import CollectiveTransport
from ritornello.transports.collective import backends_for

pytestmark = pytest.mark.accelerator

NEEDS_TWO = pytest.mark.skipif(
    simulated.REAL is not None and torch.accelerator.device_count() < 2, reason="needs two devices"
)


def numbered(accelerator: str, number: int | None) -> str:
    return "cpu" if number is None else f"{accelerator}:{number}"


@NEEDS_TWO
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(
    ("trainer", "shard"), [(0, 1), (1, 0), (1, 1), (1, None), (None, 1)], ids=str
)
@pytest.mark.parametrize("own_stream", [False, True])
def test_shard_and_mini_batches_on_two_devices(
    accelerator: str, trainer: int | None, shard: int | None, current: int, own_stream: bool
) -> None:
    torch.accelerator.set_device_index(current)
    device, storage = numbered(accelerator, trainer), numbered(accelerator, shard)
    if own_stream:
        with new_stream(f"{accelerator}:0"), new_stream(f"{accelerator}:1"):
            got = augmented(device, storage=storage)
    else:
        got = augmented(device, storage=storage)
    assert same(augmented("cpu"), got)


@NEEDS_TWO
@pytest.mark.parametrize("own_stream", [False, True])
def test_what_is_stored_on_another_device(accelerator: str, own_stream: bool) -> None:
    """The trainer's thread reads it there, behind what the worker has written."""
    seen = []
    for device, storage in (("cpu", "cpu"), (f"{accelerator}:0", f"{accelerator}:1")):
        out = []
        with (
            new_stream(storage) if own_stream and device != "cpu" else nullcontext(),
            RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer,
        ):
            for step, batch in enumerate(batches(device, 12)):
                buffer.update(batch)
                if step % 3 == 2:
                    out += stored(buffer)
                    out.append(torch.tensor(sorted(buffer.stats().held_per_class.items())))
                    out += [leaf.cpu() for batch in buffer.representatives(16) for leaf in batch]
        seen.append(out)
    assert same(*seen)


@NEEDS_TWO
@pytest.mark.parametrize("shard", [0, 1, None])
def test_rehearse_for_a_device_that_is_not_the_current_one(
    accelerator: str, shard: int | None
) -> None:
    storage = numbered(accelerator, shard)
    with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
        got = rehearsed(pinned(batches("cpu")), f"{accelerator}:1", buffer)
        assert all(leaf.device == torch.device(accelerator, 1) for leaf in got)
        assert same(augmented("cpu"), got)


@NEEDS_TWO
@pytest.mark.parametrize("where", ["on it", "not said"])
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_loader_uses_the_device_of_the_trainer(
    accelerator: str, where: str, own_stream: bool
) -> None:
    """Its thread is another, but a rank's device is the current one there, too."""

    def loader() -> Iterator[Batch]:
        for images, labels in batches("cpu"):
            yield images.to(accelerator), labels.to(accelerator)

    torch.accelerator.set_device_index(1)
    with RehearsalBuffer(60, **ARGUMENTS) as buffer:
        if own_stream:
            with new_stream(f"{accelerator}:1"):
                got = rehearsed(loader(), accelerator if where == "on it" else None, buffer)
                torch.accelerator.synchronize()
        else:
            got = rehearsed(loader(), accelerator if where == "on it" else None, buffer)
    assert {leaf.device for leaf in got} == {torch.device(accelerator, 1)}
    assert same(augmented("cpu"), got)


@NEEDS_TWO
def test_a_name_without_a_number_is_the_current_device(accelerator: str) -> None:
    torch.accelerator.set_device_index(1)
    with RehearsalBuffer(60, num_representatives=1, storage=accelerator) as buffer:
        buffer.update(batches(accelerator, 1)[0])
        assert len(buffer) == 16  # the round is over
        assert buffer._steps.rounds.shard.rows.device == torch.device(accelerator, 1)


# Ranks.


@contextmanager
def group_of(rank: int, num_ranks: int, store: Any, accelerator: str) -> Iterator[None]:
    """A default process group with the accelerator's backend."""
    if accelerator == "sim":
        from simulated import collectives

        collectives.register()
    torch.accelerator.set_device_index(rank)
    dist.init_process_group(
        backends_for(torch.device(accelerator)),
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("trainer", ["cpu", "accelerator"])
def test_the_collective_transport_with_one_rank(
    accelerator: str, trainer: str, tmp_path: Path
) -> None:
    with group_of(0, 1, dist.FileStore(str(tmp_path / "store"), 1), accelerator):
        device = torch.device(accelerator, 0)
        transport = CollectiveTransport.beside(None, 60.0, device)
        trainer_device = accelerator if trainer == "accelerator" else "cpu"
        got = augmented(trainer_device, storage=accelerator, transport=transport)
    assert same(augmented("cpu"), got)


def _on_own_device(rank: int, folder: str, schedule: str, num_devices: int) -> None:
    expected = augmented("cpu")
    dist.destroy_process_group()
    with (
        simulated.accelerator(schedule) as name,
        group_of(rank, 2, dist.FileStore(f"{folder}/store", 2), name),
    ):
        assert torch.accelerator.current_device_index() == rank
        stream = batches(name)
        assert same(expected, augmented(name, storage=name))
        arguments = ARGUMENTS | {"storage": name}
        with RehearsalBuffer(60, **arguments) as buffer:
            for batch in stream[:20]:
                buffer.update(batch)
            buffer.save(folder)
        with RehearsalBuffer(60, **arguments) as buffer:
            buffer.load(folder)
            got = [leaf for batch in stream[20:] for leaf in buffer.update(batch)]
            assert same(expected[40:], got)


@pytest.mark.slow
@NEEDS_TWO
@pytest.mark.parametrize("schedule", ["lazy", "random-1"] if simulated.REAL is None else ["real"])
def test_two_ranks_each_with_its_device(schedule: str, tmp_path: Path) -> None:
    assert spawn_ranks(2, _on_own_device, str(tmp_path), schedule, 2) == [None, None]


def _learn(rank: int, folder: str, schedule: str | None) -> list[torch.Tensor]:
    """Data-parallel training with a buffer; without a schedule on the CPU."""
    if schedule is None:
        return _parameters_after_training(torch.device("cpu"))
    simulated.missing()  # before the first backward pass
    dist.destroy_process_group()
    with (
        simulated.accelerator(schedule) as name,
        group_of(rank, 2, dist.FileStore(f"{folder}/store", 2), name),
    ):
        return _parameters_after_training(torch.device(name, rank))


def _parameters_after_training(device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(192, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10))
    parallel = torch.nn.parallel.DistributedDataParallel(
        model.to(device),
        device_ids=None if device.type == "cpu" else [device],
        bucket_cap_mb=0.01,  # several all-reduces a step
    )
    optimiser = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    stream = batches("cpu", 20)[dist.get_rank() :: 2]
    with RehearsalBuffer(60, **ARGUMENTS) as buffer:
        import ritornello

        for images, labels in ritornello.rehearse(stream, buffer, device):
            logits = parallel(images.flatten(1) / 255)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return [each.detach().cpu() for each in model.parameters()]


@pytest.mark.slow
@NEEDS_TWO
@pytest.mark.parametrize("schedule", ["lazy", "random-1"] if simulated.REAL is None else ["real"])
def test_data_parallel_training_on_two_devices(schedule: str, tmp_path: Path) -> None:
    """On the simulated devices bit for bit as on CPUs."""
    (expected, _), (got, other) = (
        spawn_ranks(2, _learn, str(tmp_path), None),
        spawn_ranks(2, _learn, str(tmp_path), schedule),
    )
    assert isinstance(got, list), got
    assert isinstance(expected, list), expected
    assert same(got, other)
    if simulated.REAL is None:
        assert same(expected, got)
    else:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, got, strict=True))
