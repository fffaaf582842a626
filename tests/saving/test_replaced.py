"""Reading a folder while another job saves there: who reads looks again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_streams import held, joined, make, on_ranks, run_on, saved_after

from ritornello import CheckpointError, SavedFolder
from ritornello.experiments.inspection.inspection import inspect_buffer
from ritornello.saving.folder import MOST_LOOKS
from ritornello.saving.shard_file import ShardFile
from ritornello.transports import LocalTransport, Transport


@pytest.fixture
def saved_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], list[Any]]:
    """Has another job save whenever the n-th file is about to be opened, a number of times.

    What each of those saves holds is noted.
    """
    noted: list[Any] = [saved_after(tmp_path, 2, 6)]
    in_turn = threading.Lock()
    once = ShardFile.__init__

    def start(nth: int, num_times: int) -> list[Any]:
        num_opened = 0

        def opening(self: ShardFile, path: Path, sha256: str) -> None:
            nonlocal num_opened
            with in_turn:
                num_opened += 1
                if num_opened % nth == 0 and len(noted) <= num_times:
                    noted.append(saved_after(tmp_path, 2, 6 + len(noted)))
            once(self, path, sha256)

        monkeypatch.setattr(ShardFile, "__init__", opening)
        return noted

    return start


@pytest.mark.parametrize("has_begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_load_looks_again(
    nth: int, num_ranks: int, has_begun: bool, tmp_path: Path, saved_meanwhile: Any
) -> None:
    noted = saved_meanwhile(nth, 4)

    def rank_main(end: Transport) -> list[tuple[int, int]]:
        with make(end) as buffer:
            if has_begun:
                run_on(buffer, end.rank, range(9))
            buffer.load(tmp_path)
            found = held(buffer)
            run_on(buffer, end.rank, range(20, 24))
            return found

    found = sorted(joined(on_ranks(num_ranks, rank_main)))
    assert found in [sorted(each) for each in noted]
    assert len(noted) > 1


def test_a_folder_that_is_saved_all_the_time(tmp_path: Path, saved_meanwhile: Any) -> None:
    """It does not look for ever, and the buffer stays as it was."""
    noted = saved_meanwhile(1, 10**6)
    with make(LocalTransport()) as buffer:
        with pytest.raises(CheckpointError, match=f"{MOST_LOOKS} times: another job saves there"):
            buffer.load(tmp_path)
        assert len(buffer) == 0
        run_on(buffer, 0, range(3))
    assert len(noted) > MOST_LOOKS


def test_damage_is_no_reason_to_look_again(tmp_path: Path) -> None:
    saved_after(tmp_path, 1, 6)
    (path,) = tmp_path.glob("*.safetensors")
    path.unlink()
    with (
        make(LocalTransport()) as buffer,
        pytest.raises(CheckpointError, match="cannot be opened: No such file"),
    ):
        buffer.load(tmp_path)


def test_inspecting_looks_again(tmp_path: Path, saved_meanwhile: Any) -> None:
    noted = saved_meanwhile(2, 2)
    inspection = inspect_buffer(tmp_path)
    assert inspection.is_whole
    assert len(inspection.slots) == len(noted[-1])
    assert len(noted) == 3


def test_reading_a_save_that_was_replaced_says_so(tmp_path: Path, saved_meanwhile: Any) -> None:
    saved = SavedFolder(tmp_path)
    saved_meanwhile(1, 1)
    with pytest.raises(CheckpointError, match="another save has taken the place of this one"):
        list(saved.representatives(0))
    assert list(SavedFolder(tmp_path).representatives(0))
