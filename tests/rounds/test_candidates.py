"""Which samples of a mini-batch are candidates, and that the choice may be made ahead."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from ritornello import RehearsalBuffer
from ritornello.arrays import Ints
from ritornello.rounds.staging import Candidates

STEPS = [(20, 5), (20, 5), (8, 5), (20, 5), (20, 6), (20, 6), (20, None), (20, 0), (4, 5), (20, 5)]
"""Samples and expected candidates of one mini-batch after the other."""


def listed(rows: Ints | None) -> list[int] | None:
    return None if rows is None else rows.tolist()


def test_a_choice_made_ahead_is_the_same() -> None:
    ahead, at_once = Candidates(3, rank=1), Candidates(3, rank=1)
    for step, sizes in enumerate(STEPS):
        rows = listed(ahead.rows(step, *sizes))
        assert rows == listed(at_once.rows(step, *sizes))
        assert rows == listed(ahead.rows(step, *sizes))  # as where a step is prepared again
        ahead.look_ahead()


def test_a_choice_is_made_ahead_for_a_mini_batch_like_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidates = Candidates(0, rank=0)
    candidates.look_ahead()  # there was none yet
    candidates.rows(0, 50, 9)
    candidates.look_ahead()
    with monkeypatch.context() as patch:
        patch.setattr(candidates, "_chosen", None)  # would fail
        following = candidates.rows(1, 50, 9)
        assert following is not None
    assert listed(following) == listed(Candidates(0, rank=0).rows(1, 50, 9))
    assert listed(following) != listed(candidates.rows(2, 50, 9))


def test_what_is_stored_does_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored() -> list[int]:
        with RehearsalBuffer(
            200, num_representatives=4, num_candidates=3, selection="reservoir", label=None
        ) as buffer:
            for step in range(40):
                size = 7 if step % 6 == 5 else 11
                buffer.update(torch.arange(size) + 100 * step)
            return [int(each) for part in buffer.representatives() for each in part]

    found = stored()
    monkeypatch.setattr(Candidates, "look_ahead", lambda self: None)
    assert found == stored()
    assert 0.7 < len(found) / (40 * 3) < 1.3
    assert len(np.unique(found)) == len(found)


def test_the_trainer_chooses_for_the_first_mini_batch_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose, choosers = Candidates._chosen, list[threading.Thread]()

    def chosen(candidates: Candidates, *arguments: Any) -> Ints | None:
        choosers.append(threading.current_thread())
        return choose(candidates, *arguments)

    monkeypatch.setattr(Candidates, "_chosen", chosen)
    with RehearsalBuffer(20, num_representatives=2, num_candidates=3) as buffer:
        for step in range(10):
            buffer.update((torch.arange(8) + step, torch.arange(8)))
        len(buffer)  # waits for the last round
    trainer = threading.current_thread()
    assert [each is trainer for each in choosers] == [True] + 10 * [False]
