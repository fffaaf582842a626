"""Fixtures for all tests; each test also fails if it leaks a thread or a process group."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

import simulated

for offline in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):  # read when it is imported
    os.environ[offline] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with mnist.npz and cifar10.npz, where the checkout has one beside it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "mnist.npz").exists():
        pytest.skip("needs mnist.npz and cifar10.npz in ../shared/data beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves a worker thread, a child process or a process group behind."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    deadline = time.monotonic() + 3.0
    while (leaked := _workers() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not leaked, f"threads left behind: {leaked}"
    assert not dist.is_initialized(), "a process group was left behind"
    assert not multiprocessing.active_children(), "a child process was left behind"


def _workers() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if not isinstance(each, threading._DummyThread)}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Loads the simulated accelerator, if a test wants it, before any test trains something."""
    wanted = [item for item in session.items if item.get_closest_marker("accelerator")]
    if wanted and (reason := simulated.missing()):
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=reason))
    # What was imported need not be looked through at the end of every test.
    gc.collect()
    gc.freeze()


@pytest.fixture(params=simulated.SCHEDULES if simulated.REAL is None else ("real",))
def accelerator(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a device, real or simulated; fails a test in which its streams race."""
    with simulated.accelerator(request.param) as name:
        yield name
