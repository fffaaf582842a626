"""On an accelerator a buffer gives what it gives on the CPU, bit for bit, whatever runs late."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_batches import ARGUMENTS, augmented, batches, new_stream, pinned, rehearsed, same, stored

import simulated
from ritornello import RehearsalBuffer, RoundError
from ritornello.testing import spawn_ranks

pytestmark = pytest.mark.accelerator

PLACES = ("cpu", "pinned", "shared", "accelerator")
"""Where the shard lies."""


def named(place: str, accelerator: str) -> str:
    return accelerator if place == "accelerator" else place


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_update(accelerator: str, place: str, asynchronous: bool) -> None:
    storage = named(place, accelerator)
    got = augmented(accelerator, storage=storage, asynchronous=asynchronous)
    assert same(augmented("cpu"), got)


@pytest.mark.parametrize(
    ("how", "place", "stays"),
    [
        ("update", "accelerator", "on the device"),
        ("update", "pinned", "on the device"),
        ("rehearse", "accelerator", "on the device"),
        ("rehearse", "cpu", "in CPU memory"),
        ("draw", "cpu", "on the device"),
        ("draw", "cpu", "in CPU memory"),
    ],
)
def test_samples_that_are_stored_in_another_form(
    accelerator: str, how: str, place: str, stays: str
) -> None:
    """Halves are stored, and doubled where they are decoded: on the worker's stream, or the CPU."""

    def forms(device: str) -> dict[str, Any]:
        at = torch.device(device if stays == "on the device" else "cpu")
        return {
            "encode": lambda batch: (batch[0].to(at) // 2, batch[1].to(at)),
            "decode": lambda stored: (stored[0] * 2, stored[1]),
        }

    def played(device: str, storage: str) -> list[torch.Tensor]:
        arguments = {**ARGUMENTS, **forms(device), "storage": storage}
        if how == "update":
            return augmented(device, **arguments)
        with RehearsalBuffer(60, **arguments) as buffer:
            if how == "rehearse":
                return rehearsed(batches("cpu"), device, buffer)
            out = list[torch.Tensor]()
            for batch in batches(device):
                drawn = buffer.draw()
                if drawn is not None:
                    assert buffer.past_mask.device == drawn[0].device
                    out += drawn
                simulated.lag(device)
                buffer.offer(batch)
            return [leaf.cpu() for leaf in out]

    assert same(played("cpu", "cpu"), played(accelerator, named(place, accelerator)))


def test_training_on_the_device_after_a_fill_from_the_cpu(accelerator: str) -> None:
    """As without: what a loader gives on the CPU does not decide where the trainer is."""
    out = []
    for device in ("cpu", accelerator):
        with RehearsalBuffer(60, **ARGUMENTS) as buffer:
            buffer.fill(batches("cpu", 3))
            buffer.fill(batches("cpu", 3))
            for batch in batches(device, 10):
                out.append([leaf.clone() for leaf in buffer.update(batch)])
                assert buffer.past_mask.device.type == torch.device(device).type
                assert buffer.num_past == 7
    assert same([leaf for step in out[:10] for leaf in step], [x for s in out[10:] for x in s])


def test_mini_batches_on_the_cpu_and_a_shard_on_the_device(accelerator: str) -> None:
    assert same(augmented("cpu"), augmented("cpu", storage=accelerator))


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
@pytest.mark.parametrize("sampling", ["class-balanced", "grasp"])
def test_policies_that_look_at_labels(accelerator: str, place: str, sampling: str) -> None:
    got = augmented(accelerator, sampling=sampling, storage=named(place, accelerator))
    assert same(augmented("cpu", sampling=sampling), got)


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
def test_several_draws_and_what_is_stored(accelerator: str, place: str) -> None:
    def embed(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        simulated.lag(batch[0].device.type, 3_000_000)
        return batch[0].flatten(1).float()

    seen = []
    for device, storage in (("cpu", "cpu"), (accelerator, named(place, accelerator))):
        out = []
        arguments = {"num_draws": 2, "sampling": "grasp", "storage": storage}
        with RehearsalBuffer(60, num_representatives=7, **arguments) as buffer:
            for step, batch in enumerate(batches(device)):
                draws = buffer.draw()
                buffer.offer(batch)
                if draws is not None:
                    out += [leaf for draw in draws for leaf in draw]
                if step % 10 == 9:
                    buffer.measure_distances(embed, batch_size=8)
            for images, labels in buffer.representatives(batch_size=16):
                assert images.device.type == torch.device(device).type
                out += [images, labels]
        seen.append(out)
    assert same(*seen)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("own_stream", [False, True])
def test_rehearse(accelerator: str, place: str, own_stream: bool) -> None:
    expected, storage = augmented("cpu"), named(place, accelerator)
    with (
        new_stream(accelerator) if own_stream else nullcontext(),
        RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer,
    ):
        got = rehearsed(pinned(batches("cpu")), accelerator, buffer)
        assert all(leaf.device.type == accelerator for leaf in got)
        assert same(expected, got)


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
def test_a_trainer_on_a_stream_of_its_own(accelerator: str, place: str) -> None:
    with new_stream(accelerator):
        got = augmented(accelerator, storage=named(place, accelerator))
    assert same(augmented("cpu"), got)


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
@pytest.mark.parametrize("accelerator", ["lazy", "random-1"], indirect=True)
def test_training_under_autocast_changes_nothing(accelerator: str, place: str) -> None:
    """Mixed precision is the model's: records keep their dtypes, also those that it gives."""
    model = torch.nn.Linear(192, 10, device=accelerator)
    scaler = torch.amp.GradScaler(accelerator, enabled=accelerator == "cuda")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    offered: dict[bytes, torch.Tensor] = {}
    storage = named(place, accelerator)
    with RehearsalBuffer(60, num_representatives=7, storage=storage) as buffer:
        for images, labels in batches(accelerator):
            past = buffer.draw()
            with torch.autocast(accelerator, torch.float16):
                logits = model(images.flatten(1) / 255)
            assert logits.dtype == torch.float16
            buffer.offer((images, labels, logits.detach()))
            offered |= {
                image.numpy().tobytes(): each
                for image, each in zip(images.cpu(), logits.detach().cpu(), strict=True)
            }
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            if past is not None:
                assert [leaf.dtype for leaf in past] == [torch.uint8, torch.int64, torch.float16]
                for image, of_image in zip(past[0].cpu(), past[2].cpu(), strict=True):
                    assert torch.equal(offered[image.numpy().tobytes()], of_image)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()


@pytest.mark.parametrize("trainer", ["cpu", "accelerator"])
@pytest.mark.parametrize("place", ["cpu", "accelerator"])
def test_a_device_that_is_busy_when_the_buffer_begins(
    accelerator: str, trainer: str, place: str, tmp_path: Path
) -> None:
    """What the trainer's stream has not done yet must not undo what the worker's does."""
    stream = batches(named(trainer, accelerator))
    busy_cycles = 500_000_000  # some tenths of a second
    arguments = ARGUMENTS | {"storage": named(place, accelerator)}
    with RehearsalBuffer(60, **arguments) as buffer:
        simulated.lag(accelerator, busy_cycles)
        got = [leaf for batch in stream[:20] for leaf in buffer.update(batch)]
        buffer.save(tmp_path)
    with RehearsalBuffer(60, **arguments) as buffer:
        simulated.lag(accelerator, busy_cycles)
        buffer.load(tmp_path)
        got += [leaf for batch in stream[20:] for leaf in buffer.update(batch)]
    assert same(augmented("cpu"), got)


@pytest.mark.parametrize("place", ["cpu", "pinned", "accelerator"])
@pytest.mark.parametrize("trainer", ["cpu", "accelerator"])
def test_saving_and_loading(accelerator: str, place: str, trainer: str, tmp_path: Path) -> None:
    def make(**arguments: Any) -> RehearsalBuffer:
        return RehearsalBuffer(60, **(ARGUMENTS | arguments))

    storage = named(place, accelerator)
    stream, expected = batches(named(trainer, accelerator)), augmented("cpu")
    with make(storage=storage) as buffer:
        for number, batch in enumerate(stream[:25]):
            if number == 21:
                buffer.save(tmp_path / "at once")
                state = buffer.state_dict()
                buffer.save(tmp_path / "beside", background=True)
            buffer.update(batch)
        buffer.wait_until_saved()
    for source in ("at once", "beside", "state"):
        with make(storage=storage) as buffer:
            if source == "state":
                buffer.load_state_dict(state)
            else:
                buffer.load(tmp_path / source)
            got = [leaf for batch in stream[21:] for leaf in buffer.update(batch)]
            assert same(expected[42:], got)
    with make(num_draws=2) as buffer:  # on the CPU, with other arguments
        buffer.load(tmp_path / "at once")
        assert len(buffer.update(batches("cpu", 1)[0])[0]) == 16 + 14


@pytest.mark.parametrize("trainer", ["cpu", "accelerator"])
@pytest.mark.parametrize("place", ["cpu", "accelerator"])
def test_what_is_stored_at_any_time(accelerator: str, trainer: str, place: str) -> None:
    """Also while classes are counted and saves go on in small pieces between rounds."""
    seen = []
    for device, storage in (
        ("cpu", "cpu"),
        (named(trainer, accelerator), named(place, accelerator)),
    ):
        out = []
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for step, batch in enumerate(batches(device, 24)):
                buffer.update(batch)
                if step % 3 == 2:
                    out += stored(buffer)
                    out.append(torch.tensor(sorted(buffer.stats().held_per_class.items())))
        seen.append(out)
    assert same(*seen)


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
def test_a_background_save_in_small_pieces(
    accelerator: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritornello.saving.writing.PIECE_BYTES", 1000)
    seen = []
    for device, storage in (("cpu", "cpu"), (accelerator, named(place, accelerator))):
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for step, batch in enumerate(batches(device, 30)):
                if step == 15:
                    buffer.save(tmp_path / device, background=True)
                buffer.update(batch)
            buffer.wait_until_saved()
        with RehearsalBuffer(60, num_representatives=7) as buffer:
            buffer.load(tmp_path / device)
            seen.append(stored(buffer))
    assert same(*seen)


@pytest.mark.parametrize("values_from", ["cpu", "accelerator"])
@pytest.mark.parametrize("trainer", ["cpu", "accelerator"])
@pytest.mark.parametrize("place", PLACES)
def test_rewriting(accelerator: str, place: str, trainer: str, values_from: str) -> None:
    """Also where what the function has asked the device for runs late, and a save writes."""
    seen = []
    for device, storage, source in (
        ("cpu", "cpu", "cpu"),
        (named(trainer, accelerator), named(place, accelerator), named(values_from, accelerator)),
    ):

        def inverted(batch: tuple[torch.Tensor, torch.Tensor], source: str = source) -> Any:
            simulated.lag(source)
            return 255 - batch[0].to(source)

        out = []
        with RehearsalBuffer(60, **ARGUMENTS, storage=storage) as buffer:
            for step, batch in enumerate(batches(device, 24)):
                out += [leaf.clone() for leaf in buffer.update(batch)]
                if step % 6 == 5:
                    buffer.rewrite(inverted, fields=0, batch_size=16)
                    out += stored(buffer)
        seen.append(out)
    assert same(*seen)


def test_labels_on_the_device_are_checked_by_the_worker(accelerator: str) -> None:
    images, labels = batches(accelerator, 1)[0]
    with RehearsalBuffer(60, num_representatives=7) as buffer:
        buffer.update((images, labels - 100))
        with pytest.raises(RoundError, match="is out of range: labels must be at least 0"):
            buffer.update((images, labels))


def test_samples_of_unequal_length_stay_in_cpu_memory(accelerator: str) -> None:
    """What cannot be on a device is refused by name, and from the CPU the buffer goes on."""
    samples = [torch.zeros(2), torch.zeros(3)]
    arguments = {"num_representatives": 2, "selection": "fifo", "label": None}
    with RehearsalBuffer(20, capacity_bytes=9000, **arguments) as buffer:
        with pytest.raises(ValueError, match=rf"the mini-batch is on {accelerator}.*: offer such"):
            buffer.update([each.to(accelerator) for each in samples])
        buffer.update(samples)
        assert len(buffer.update(samples)) == 4
    for storage in (accelerator, "pinned"):
        with (
            RehearsalBuffer(20, capacity_bytes=9000, storage=storage, **arguments) as buffer,
            pytest.raises(ValueError, match=rf"storage='{storage}.*stored in CPU memory or"),
        ):
            buffer.update(samples)


def test_leaves_on_different_devices_come_back_where_they_were(accelerator: str) -> None:
    with RehearsalBuffer(20, num_representatives=4) as buffer:
        for images, labels in batches(accelerator, 5):
            joined_images, joined_labels = buffer.update((images, labels.cpu()))
            assert joined_images.device.type == accelerator
            assert joined_labels.device.type == "cpu"


def test_draw_gives_the_callers_own_tensors(accelerator: str) -> None:
    with RehearsalBuffer(20, num_representatives=4) as buffer:
        kept = []
        for batch in batches(accelerator, 6):
            past = buffer.draw()
            if past is not None:
                kept.append((past[0], past[0].clone()))
            buffer.offer(batch)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in kept)


def _on_one_device(rank: int, schedule: str, transport: str) -> None:
    with simulated.accelerator(schedule) as name:
        assert same(augmented("cpu"), augmented(name, transport=transport))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_two_ranks_on_one_device(transport: str) -> None:
    """Over shared memory, and over gloo."""
    assert spawn_ranks(2, _on_one_device, "random-1", transport) == [None, None]
