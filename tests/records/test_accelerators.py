"""Names of accelerators, and what differs between their kinds."""

from __future__ import annotations

import pytest
import torch

import simulated
from ritornello import RehearsalBuffer
from ritornello.records import accelerators
from ritornello.records.storage import Storage

WITHOUT = pytest.mark.skipif(simulated.REAL is not None, reason="there is an accelerator")


@WITHOUT
@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_one_that_is_not_there(kind: str) -> None:
    message = f"storage='{kind}': this machine has no {kind.upper()} device"
    with pytest.raises(ValueError, match=message):
        RehearsalBuffer(10, num_representatives=1, storage=kind)


@WITHOUT
def test_pinned_memory_without_one() -> None:
    with pytest.raises(ValueError, match="storage='pinned': this machine has no accelerator"):
        RehearsalBuffer(10, num_representatives=1, storage="pinned")


@WITHOUT
def test_a_machine_without_one() -> None:
    assert not accelerators.is_available()
    assert not accelerators.is_in_use()
    assert accelerators.name_of(torch.device("cpu")) == "CPU"


@pytest.mark.parametrize("name", ["cpu", "meta", "tape", "cuda:x", "vulkan"])
def test_names_of_no_accelerator(name: str) -> None:
    assert accelerators.named(name) is None


@pytest.mark.accelerator
@pytest.mark.parametrize("accelerator", ["lazy"], indirect=True)
def test_one_that_is_there(accelerator: str) -> None:
    assert accelerators.is_available()
    assert accelerators.is_in_use()
    assert accelerators.named(accelerator) == torch.device(accelerator)
    assert accelerators.current_device() == torch.device(accelerator, 0)
    assert accelerators.name_of(torch.device(accelerator, 0)) != "CPU"
    assert Storage.of(accelerator) == Storage(accelerator, torch.device(accelerator, 0))
    assert Storage.of(torch.device(accelerator, 1)).device == torch.device(accelerator, 1)
    assert str(Storage.of(accelerator)) == accelerator


@pytest.mark.accelerator
@pytest.mark.parametrize("accelerator", ["lazy"], indirect=True)
def test_ranks_take_turns(accelerator: str) -> None:
    num_devices = torch.accelerator.device_count()
    for rank in range(num_devices + 1):
        expected = torch.device(accelerator, rank % num_devices)
        assert accelerators.use_number(rank) == expected


@pytest.mark.accelerator
@pytest.mark.parametrize("accelerator", ["lazy"], indirect=True)
def test_random_numbers_are_as_before(accelerator: str) -> None:
    device = torch.device(accelerator, 0)
    state = accelerators.random_state(device)
    with accelerators.forked_random_state(device):
        first = torch.rand(3, device=device)
    assert torch.equal(torch.rand(3, device=device).cpu(), first.cpu())
    accelerators.set_random_state(device, state)
    assert torch.equal(torch.rand(3, device=device).cpu(), first.cpu())


class AsOnMps:
    """What ``torch.mps`` has: no streams, and one device that nobody has to name."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def get_rng_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.calls.append("set_rng_state")


def test_mps_has_one_device_and_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    device, module = torch.device("mps"), AsOnMps()
    monkeypatch.setattr(accelerators, "_module", lambda device: module)
    assert not accelerators.has_streams(device)
    assert accelerators.mark(device) is None
    accelerators.synchronize(device)
    accelerators.set_random_state(device, accelerators.random_state(device))
    assert module.calls == ["synchronize", "set_rng_state"]
    assert accelerators.name_of(device) == "mps"


@WITHOUT
@pytest.mark.accelerator
def test_memory_that_is_given_away_after_a_copy() -> None:
    with simulated.accelerator("lazy", late_pageable_copies=True) as name:
        values = torch.arange(3)
        copied = accelerators.copied_to(torch.device(name, 0), values)
        values += 1
        assert torch.equal(copied.cpu(), torch.arange(3))


def test_a_copy_for_a_device_without_streams_blocks() -> None:
    values = torch.arange(3)
    assert torch.equal(accelerators.copied_to(torch.device("cpu"), values), values)


def test_seeded_random_numbers_are_those_of_the_seed_and_leave_all_others_as_they_were() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with accelerators.seeded(torch.device("cpu"), 7):
        drawn = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
