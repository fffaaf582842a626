"""A folder is the one that it was at the call, wherever the process goes meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from saved_streams import held, loaded_on, make, run_on, saved_after

from ritornello import CheckpointError, SavedFolder, forget
from ritornello.transports import LocalTransport


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder to go to, with a save of its own under the same name."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    saved_after(tmp_path / "elsewhere" / "save", 1, 3, seed=9)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "elsewhere"


def test_a_save_in_the_background_stays_in_its_folder(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {each.name: each.read_bytes() for each in (elsewhere / "save").iterdir()}
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, range(30))
        wanted = held(buffer)
        buffer.save("save", background=True)
        here = Path.cwd()
        monkeypatch.chdir(elsewhere)
        run_on(buffer, 0, range(30, 40))
        buffer.wait_until_saved()
    assert loaded_on(here / "save", 1) == [wanted]
    assert others == {each.name: each.read_bytes() for each in (elsewhere / "save").iterdir()}


def test_a_saved_folder_is_read_where_it_was(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = saved_after(Path("save"), 1, 5)
    saved = SavedFolder("save")
    monkeypatch.chdir(elsewhere)
    found = [int(number) for each in saved.representatives(0) for number in each.batch[0]]
    assert found == [number for number, _ in wanted]


def test_what_converts_samples_may_go_elsewhere(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = saved_after(Path("save"), 1, 5)

    def convert(batch: object) -> object:
        monkeypatch.chdir(elsewhere)
        return batch

    with make(LocalTransport()) as buffer:
        buffer.load("save", convert=convert)
        assert held(buffer) == wanted


def test_forgetting_stays_in_its_folder(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = saved_after(Path("save"), 1, 30, selection="reservoir")
    here, room = Path.cwd(), "ritornello.saving.forgetting._check_room"
    monkeypatch.setattr(room, lambda _: monkeypatch.chdir(elsewhere))
    forgotten = forget("save", {"label": 0})
    assert 0 < forgotten.num_left < len(wanted)
    ((kept),) = loaded_on(here / "save", 1, selection="reservoir")
    assert sorted(kept) == sorted(each for each in wanted if each[1] != 0)


@pytest.mark.parametrize(
    ("folder", "kind", "message"),
    [
        ("", ValueError, "folder='': a folder's path has a character"),
        ("a\0b", ValueError, "and none that is NUL"),
        (b"", ValueError, "folder=b'': a folder's path has a character"),
        (None, TypeError, "folder=None: it must be the path of a folder"),
        (5, TypeError, "folder=5: it must be the path of a folder"),
    ],
)
def test_what_is_no_path(folder: Any, kind: type[Exception], message: str, elsewhere: Path) -> None:
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, range(3))
        with pytest.raises(kind, match=message):
            buffer.save(folder)
        with pytest.raises(CheckpointError, match=f"load failed: .*{message}"):
            buffer.load(folder)
        with pytest.raises(kind, match=message):
            SavedFolder(folder)
        assert not list(Path.cwd().iterdir())
        buffer.save(b"in bytes")
        assert len(SavedFolder(b"in bytes").manifest.files) == 1


@pytest.mark.parametrize("inside", ["", "inside"])
def test_what_is_no_folder(inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, range(3))
        with pytest.raises(CheckpointError, match=r"file.* cannot be made: .* is no folder"):
            buffer.save(tmp_path / "file" / inside)
        run_on(buffer, 0, range(3, 5))
