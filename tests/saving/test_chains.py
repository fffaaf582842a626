"""Chains of saves and loads lose, double and change nothing. ``benchmarks/chains.py`` plays 2,000."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chains import play

from ritornello.policies.saved.classes import SavedClasses
from ritornello.rounds.round import Rounds
from ritornello.saving.state_dict import _ShardInMemory

NUM_CHAINS = 16


@pytest.mark.filterwarnings("ignore:.* distinct values so far")  # more classes than slots
@pytest.mark.parametrize("number", range(NUM_CHAINS))
def test_a_chain(number: int, tmp_path: Path) -> None:
    play(0, number, tmp_path)


def _loses_the_last(owner: Any, name: str) -> Callable[..., Any]:
    whole = getattr(owner, name)

    def losing(self: Any, *arguments: Any) -> Any:
        found = whole(self, *arguments)
        if len(found.slots) > 3:
            found.counts[found.counts.argmax()] -= 1
        return found

    return losing


def _swaps_two(owner: Any, name: str) -> Callable[..., Any]:
    whole = getattr(owner, name)

    def swapping(self: Any, slots: Any) -> Any:
        for positions, records in whole(self, slots):
            yield positions, records[::-1].copy()

    return swapping


def _forgets_rounds(owner: Any, name: str) -> Callable[..., Any]:
    whole = getattr(owner, name)

    def forgetting(self: Any, num_rounds: int, *others: Any) -> Any:
        whole(self, num_rounds, *others)
        self.admitted_in[:] = 0

    return forgetting


MISTAKES = {
    "one is lost": (SavedClasses, "of_rank", _loses_the_last),
    "records are swapped": (_ShardInMemory, "rows", _swaps_two),
    "rounds are forgotten": (Rounds, "go_on", _forgets_rounds),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_noticed(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, wrong(owner, name))
    with pytest.raises((AssertionError, RuntimeError)) as error:
        for number in range(40):
            play(1, number, tmp_path / str(number))
    assert any(each.startswith("--seed 1 --first ") for each in error.value.__notes__)
