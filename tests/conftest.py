"""Fixtures for all tests; each test also fails if it leaks a thread or a process group."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


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


def pytest_collection_finish() -> None:
    """What was imported need not be looked through at the end of every test."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``cuda`` on machines without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
