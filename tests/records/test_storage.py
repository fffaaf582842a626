from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ritornello import RehearsalBuffer
from ritornello.records import storage
from ritornello.records.storage import MappedMemory, Storage
from ritornello.testing import spawn_ranks


@pytest.mark.parametrize("kind", ["auto", "cpu", "shared", "file"])
def test_rows_are_zero_and_can_be_written(kind: str, tmp_path: Path) -> None:
    place = Storage.of(f"file:{tmp_path}" if kind == "file" else kind)
    rows = place.allocate(5, 48)
    assert rows.shape == (5, 48)
    assert not rows.any()
    rows[3] = 7
    assert rows.sum() == 48 * 7
    assert not list(tmp_path.iterdir()), "the file must have no name"


def test_memory_is_shared_by_descriptor_and_ends_with_its_last_user() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        Storage.of("shared").create(64) as memory,
        MappedMemory.open(os.getpid(), memory.descriptor, 64, Storage.of("shared")) as again,
    ):
        ours, theirs = memory.map(), again.map()
    ours[5] = 9
    assert theirs[5] == 9
    del ours, theirs
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_more_than_is_free_says_how_much_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_memory_bytes", lambda: 10**9)
    for kind in ("cpu", "shared", "auto"):
        with pytest.raises(MemoryError, match=r"needs 2.00 GB .* 1.00 GB are free: .*file:DIR"):
            Storage.of(kind).allocate(2_000_000, 1000)


def test_cached_files_leave_their_memory_to_whoever_needs_it(tmp_path: Path) -> None:
    for name, text in (
        ("memory.max", "1000000"),
        ("memory.current", "990000"),
        ("memory.stat", "anon 90000\ninactive_file 800000\nactive_file 100000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert storage.free_memory_bytes(tmp_path) == 910_000
    (tmp_path / "memory.max").write_text("max")
    assert storage.free_memory_bytes(tmp_path) == storage.free_memory_bytes(tmp_path / "nothing")


def test_a_full_disk_is_an_error_rather_than_a_killed_process(tmp_path: Path) -> None:
    place = Storage.of(f"file:{tmp_path}")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(MemoryError, match=r"lower the capacity|no file can be made"):
            place.allocate(1000, 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _one_rank_without_memory(rank: int, folder: str) -> str:
    if rank == 1:
        storage.MappedMemory.reserve = _no_memory  # type: ignore[method-assign]
    buffer = RehearsalBuffer(8, num_representatives=2, storage=folder, timeout_seconds=20.0)
    try:
        with buffer:
            for _ in range(3):
                buffer.update((torch.zeros(4), torch.arange(4)))
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


def _no_memory(*_: object) -> None:
    raise MemoryError("no room")


@pytest.mark.parametrize("kind", ["shared", "file"])
def test_if_one_rank_has_no_memory_all_say_so(kind: str, tmp_path: Path) -> None:
    folder = f"file:{tmp_path}" if kind == "file" else kind
    here, there = spawn_ranks(2, _one_rank_without_memory, folder)
    assert "rank 0: round 0 (admit) failed: the shard of rank(s) [1] could not be made" in str(here)
    assert "rank 1: round 0 (admit) failed: no room" in str(there)


def _draws(rank: int, place: str, transport: str) -> list[int]:
    numbers = []
    with RehearsalBuffer(
        16, num_representatives=3, storage=place, transport=transport, num_candidates=2
    ) as buffer:
        for step in range(30):
            mine = 100 * (2 * step + rank) + torch.arange(5)
            numbers += buffer.update((mine, mine % 3))[0].tolist()
    assert dist.is_initialized()
    return numbers


def test_every_storage_gives_the_same_draws(tmp_path: Path) -> None:
    reference = spawn_ranks(2, _draws, "cpu", "collective")
    assert isinstance(reference[0], list)
    for place in ("auto", "shared", f"file:{tmp_path}"):
        assert spawn_ranks(2, _draws, place, "shared_memory") == reference
    assert spawn_ranks(2, _draws, f"file:{tmp_path}", "collective") == reference
    assert not list(tmp_path.iterdir())


def test_memory_that_cannot_be_shared_is_refused() -> None:
    (outcome, _) = spawn_ranks(2, _draws, "cpu", "shared_memory")
    assert isinstance(outcome, ValueError)
    assert "transport='shared_memory' cannot read shards in storage='cpu': use" in str(outcome)


def _another_storage_on_each_rank(rank: int) -> str:
    try:
        RehearsalBuffer(8, num_representatives=2, storage=("auto", "cpu")[rank])
    except ValueError as error:
        return str(error)
    return "nothing raised"


def test_ranks_with_different_storage_are_told_so() -> None:
    for message in spawn_ranks(2, _another_storage_on_each_rank):
        assert "storage is auto on rank 0, cpu on rank 1" in str(message)
