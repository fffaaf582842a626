"""The simulated accelerator itself: it computes as the CPU does, runs late, and notices races."""

from __future__ import annotations

import pytest
import torch

import simulated
from ritornello.records import accelerators
from simulated import building

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(simulated.REAL is not None, reason="there is a real accelerator"),
]

LAZY = pytest.mark.parametrize("accelerator", ["lazy"], indirect=True)


def sim() -> object:
    from simulated import device

    return device


def test_a_network_learns_as_on_the_cpu(accelerator: str) -> None:
    learnt = []
    for device in ("cpu", accelerator):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Dropout(),
            torch.nn.Linear(8 * 36, 5),
        ).to(device)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        images, labels = torch.randn(8, 3, 8, 8).to(device), (torch.arange(8) % 5).to(device)
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        learnt.append([each.detach().cpu() for each in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*learnt, strict=True))


@LAZY
def test_work_waits_until_somebody_waits_for_it(accelerator: str) -> None:
    ones = torch.ones(5, device=accelerator)
    assert sim().num_waiting() > 0
    assert ones.sum().item() == 5
    assert sim().num_waiting() == 0


@LAZY
def test_pinned_memory_is_read_late(accelerator: str) -> None:
    pinned = torch.zeros(5).pin_memory()
    assert pinned.is_pinned()
    copied = pinned.to(accelerator, non_blocking=True)
    pinned += 1
    assert copied.cpu().sum() == 5


@pytest.mark.parametrize("is_late", [False, True])
def test_pageable_memory_is_read_at_once_unless_said_otherwise(is_late: bool) -> None:
    with simulated.accelerator("lazy", late_pageable_copies=is_late) as name:
        pageable = torch.zeros(5)
        copied = pageable.to(name, non_blocking=True)
        pageable += 1
        assert copied.cpu().sum() == 5 * is_late


NUM_ELEMENTS = 12_345
"""A size of memory that no other test uses."""


def race(name: str, wait: bool = False, record: bool = False, reuse: bool = False) -> None:
    """One stream writes, another reads; then the memory is given away again."""
    other = torch.Stream(name)
    written = torch.zeros(NUM_ELEMENTS, device=name)
    if wait:
        other.wait_stream(torch.accelerator.current_stream())
    with torch.get_device_module(name).stream(other):
        read = written + 1
    if record:
        written.record_stream(other)
    if reuse:
        del written
        torch.full((NUM_ELEMENTS,), 7.0, device=name)
    other.synchronize()
    if wait and (record or not reuse):
        assert read.cpu().sum() == NUM_ELEMENTS


@pytest.mark.parametrize("schedule", simulated.SCHEDULES)
def test_accesses_that_nothing_orders_are_noticed(schedule: str) -> None:
    with (
        pytest.raises(AssertionError, match=r"read after write, .*test_simulated.py:\d+ race"),
        simulated.accelerator(schedule) as name,
    ):
        race(name)
    with simulated.accelerator(schedule) as name:
        race(name, wait=True)


@pytest.mark.parametrize("schedule", simulated.SCHEDULES)
def test_memory_that_is_given_away_too_early_is_noticed(schedule: str) -> None:
    with simulated.accelerator(schedule) as name:
        race(name, wait=True, record=True, reuse=True)
    with (
        pytest.raises(AssertionError, match="write after read, .* allocate on stream"),
        simulated.accelerator(schedule) as name,
    ):
        race(name, wait=True, reuse=True)
        assert sim().num_reused() > 0


def test_an_error_of_late_work_comes_to_who_waits() -> None:
    with simulated.accelerator("lazy") as name:
        torch.zeros(3, device=name).index_select(0, torch.tensor([5], device=name))
        with pytest.raises(RuntimeError, match="simulated accelerator: .*out of range"):
            torch.accelerator.synchronize()


def test_other_tests_see_a_machine_without_it() -> None:
    assert not accelerators.is_available()
    with simulated.accelerator("eager") as name:
        assert accelerators.is_available()
        assert torch.accelerator.current_accelerator() == torch.device(name)
    assert not accelerators.is_available()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(building.BuildError, match="there is no C\\+\\+ compiler"):
        building.library()
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(building.BuildError, match="/bin/false failed"):
        building.library()
