"""Fixtures for the tests of the experiments."""

from __future__ import annotations

import multiprocessing

import pytest

from ritornello.experiments.ranks import launch
from ritornello.experiments.training import run


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``launch`` fork ranks from a process that has imported everything: they begin at once.

    For tests of what ranks compute. They are processes of their own all the same.
    """
    multiprocessing.set_forkserver_preload([run.__name__])
    monkeypatch.setattr(launch, "START_METHOD", "forkserver")
