"""Samples of unequal length on disk, and back."""

from __future__ import annotations

import json
import threading
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ritornello import CheckpointError, RehearsalBuffer, forget
from ritornello.policies.within_bytes import WithinBytes
from ritornello.records.paged import PagedShard
from ritornello.saving import writing
from ritornello.saving.folder import SavedFolder
from ritornello.saving.manifest import with_checksum
from ritornello.testing import check_consistent, connect_shared_memory, run_ranks
from ritornello.transports import LocalTransport, Transport

CAPACITY_BYTES = 12_000


def mini_batch(step: int, rank: int = 0, form: str = "list") -> dict[str, Any]:
    dice = np.random.default_rng([step, rank])
    lengths, numbers = dice.integers(0, 60, 6), 1000 * rank + 10 * step + np.arange(6)
    bags: Any = [
        (torch.arange(2 * n).view(n, 2) + int(number)).int()
        for n, number in zip(lengths.tolist(), numbers, strict=True)
    ]
    if form == "jagged":
        bags = torch.nested.nested_tensor(bags, layout=torch.jagged)
    files = [
        b"%d," % number * (length % 5) for number, length in zip(numbers, lengths, strict=True)
    ]
    return {
        "bag": bags,
        "label": torch.from_numpy(numbers % 3),
        "file": files,
        "length": torch.from_numpy(lengths),
        "number": torch.from_numpy(numbers),
    }


def check(batch: dict[str, Any]) -> None:
    bags = batch["bag"].unbind() if isinstance(batch["bag"], torch.Tensor) else batch["bag"]
    for bag, file, length, number in zip(
        bags, batch["file"], batch["length"].tolist(), batch["number"].tolist(), strict=True
    ):
        assert torch.equal(bag, (torch.arange(2 * length).view(length, 2) + number).int())
        assert file == b"%d," % number * (length % 5)


def make(
    end: Transport | str = "local", capacity_bytes: int = CAPACITY_BYTES, **others: Any
) -> RehearsalBuffer:
    return RehearsalBuffer(
        50,
        num_representatives=3,
        capacity_bytes=capacity_bytes,
        label="label",
        transport=end,
        **others,
    )


def train(buffer: RehearsalBuffer, rank: int, steps: range, form: str = "list") -> list[Any]:
    seen = []
    for step in steps:
        batch = buffer.update(mini_batch(step, rank, form))
        check(batch)
        seen.append(batch["number"].tolist())
    return seen


def numbers_in(buffer: RehearsalBuffer) -> list[int]:
    found = []
    for batch in buffer.representatives(7):
        check(batch)
        found += batch["number"].tolist()
    return found


@pytest.mark.parametrize(
    ("how", "sampling"),
    [
        ("folder", "uniform"),
        ("background", "class-balanced"),
        ("state_dict", "uniform"),
        ("state_dict", "earlier-tasks"),
        ("folder", "grasp"),
    ],
)
def test_it_goes_on_bit_for_bit(how: str, sampling: str, tmp_path: Path) -> None:
    def rank_main(end: Transport) -> list[Any]:
        with make(end, num_draws=2, sampling=sampling) as buffer:
            buffer.begin_task("the first one")
            train(buffer, end.rank, range(10))
            buffer.begin_task("the next one")
            train(buffer, end.rank, range(10, 20))
            state = buffer.state_dict() if how == "state_dict" else None
            if how != "state_dict":
                buffer.save(tmp_path, background=how == "background")
            rest = train(buffer, end.rank, range(20, 30))
            if how == "background":
                buffer.wait_until_saved()
        return [state, rest]

    def again(end: Transport) -> list[Any]:
        with make(end, num_draws=2, sampling=sampling) as buffer:
            if states[end.rank] is not None:
                buffer.load_state_dict(states[end.rank])
            else:
                buffer.load(tmp_path)
            check_consistent(buffer)
            return train(buffer, end.rank, range(20, 30))

    first = run_ranks(connect_shared_memory(2), rank_main)
    states = [state for state, _ in first]
    assert run_ranks(LocalTransport.connect(2), again) == [rest for _, rest in first]


def test_on_other_ranks_nothing_is_lost(tmp_path: Path) -> None:
    def saves(end: Transport) -> list[int]:
        with make(end) as buffer:
            train(buffer, end.rank, range(20))
            buffer.save(tmp_path)
            return numbers_in(buffer)

    def loads(end: Transport, capacity_bytes: int) -> list[int]:
        with make(end, capacity_bytes) as buffer:
            buffer.load(tmp_path)
            check_consistent(buffer)
            held = numbers_in(buffer)
            train(buffer, end.rank, range(20, 40))
            check_consistent(buffer)
            return held

    saved = sorted(chain(*run_ranks(LocalTransport.connect(2), saves)))
    for num_ranks in (1, 3):
        # Room for pages of another size, too.
        found = run_ranks(LocalTransport.connect(num_ranks), lambda end: loads(end, 40_000))
        assert sorted(chain(*found)) == saved
        found = run_ranks(LocalTransport.connect(num_ranks), lambda end: loads(end, 7_000))
        held = list(chain(*found))
        assert 0 < len(held) < len(saved)
        assert set(held) < set(saved)


@pytest.mark.parametrize("sampling", ["class-balanced", "grasp", "earlier-tasks"])
def test_what_is_known_of_what_lies_where_goes_along(sampling: str, tmp_path: Path) -> None:
    def saves(end: Transport) -> None:
        with make(end, sampling=sampling) as buffer:
            buffer.begin_task("the first one")
            train(buffer, end.rank, range(10))
            buffer.begin_task("the next one")
            train(buffer, end.rank, range(10, 20))
            buffer.save(tmp_path)

    def loads(end: Transport) -> list[Any]:
        with make(end, 8_000, sampling=sampling) as buffer:
            buffer.load(tmp_path)
            check_consistent(buffer)
            seen = train(buffer, end.rank, range(20, 40))
            check_consistent(buffer)
            return seen

    run_ranks(LocalTransport.connect(2), saves)
    assert forget(tmp_path, {"label": 1}).num_removed > 0
    for seen in run_ranks(LocalTransport.connect(3), loads):
        past = [number % 1000 // 10 for numbers in seen for number in numbers[6:]]
        assert len(past) > 20
        if sampling == "earlier-tasks":
            assert max(past) < 10


def test_a_form_that_was_not_saved_is_learnt_from_the_next_mini_batch(tmp_path: Path) -> None:
    with make() as buffer:
        train(buffer, 0, range(9), "jagged")
        buffer.save(tmp_path)
    with make() as buffer:
        buffer.load(tmp_path)
        drawn = buffer.draw()
        assert drawn is not None
        assert drawn["bag"].layout == torch.jagged
        buffer.offer(mini_batch(9))
        drawn = buffer.draw()
        assert drawn is not None
        assert isinstance(drawn["bag"], list)
        assert isinstance(next(buffer.representatives())["bag"], list)
        buffer.rewrite(lambda batch: torch.tensor(list(map(len, batch["bag"]))), fields="length")
        assert numbers_in(buffer)


def test_what_is_saved_can_be_read_and_forgotten(tmp_path: Path) -> None:
    with make() as buffer:
        train(buffer, 0, range(20))
        buffer.save(tmp_path)
        held = numbers_in(buffer)
    found = []
    for each in SavedFolder(tmp_path).representatives(0):
        check(each.batch)
        found += each.batch["number"].tolist()
    assert found == held
    for each in SavedFolder(tmp_path).representatives(0, np.array([3, 1])):
        check(each.batch)
    gone = held[2]
    assert forget(tmp_path, {"number": gone}).num_removed == 1
    assert b"%d," % gone not in next(tmp_path.glob("*.safetensors")).read_bytes()
    with make() as buffer:
        buffer.load(tmp_path)
        check_consistent(buffer)
        assert sorted(numbers_in(buffer)) == sorted(set(held) - {gone})
        train(buffer, 0, range(20, 40))
        check_consistent(buffer)
    forget(tmp_path, {"label": [0, 1, 2]})
    with make() as buffer:
        buffer.load(tmp_path)
        assert len(buffer) == 0
        train(buffer, 0, range(5))


def test_what_is_written_in_the_background_is_what_was_there(tmp_path: Path) -> None:
    with make(asynchronous=False) as buffer:
        train(buffer, 0, range(20))
        held = numbers_in(buffer)
        buffer.save(tmp_path, background=True)
        train(buffer, 0, range(20, 60))
        buffer.wait_until_saved()
    with make() as buffer:
        buffer.load(tmp_path)
        assert numbers_in(buffer) == held


def test_a_state_dict_that_was_loaded_stays_what_it_was() -> None:
    with make() as buffer:
        train(buffer, 0, range(9))
        state = buffer.state_dict()
        expected = train(buffer, 0, range(9, 11))
    for _ in range(2):
        with make() as buffer:
            buffer.load_state_dict(state)
            assert train(buffer, 0, range(9, 11)) == expected
            train(buffer, 0, range(11, 20))


@pytest.mark.parametrize("start", [10**9, -1, 1])
def test_where_staged_pages_begin_is_not_believed(start: int) -> None:
    with make() as buffer:
        train(buffer, 0, range(9))
        state = buffer.state_dict()
        expected = train(buffer, 0, range(9, 11))
    staged = state["rank_0"][1]["staged"]
    before = staged.clone()
    staged.view(torch.int64)[:, -1] = start
    given = staged.clone()
    with make() as buffer:
        buffer.load_state_dict(state)
        assert train(buffer, 0, range(9, 11)) == expected
    assert torch.equal(staged, given)
    assert not torch.equal(staged, before)


@pytest.mark.parametrize("has_begun", [False, True], ids=["new", "begun"])
def test_a_load_whose_pages_do_not_fit_leaves_no_shard(
    has_begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as buffer:
        train(buffer, 0, range(9))
        state = buffer.state_dict()
    make_shard, num_left = LocalTransport.make_shard, 0

    def without_memory(self: LocalTransport, *arguments: Any) -> Any:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise MemoryError("so many pages do not fit")
        return make_shard(self, *arguments)

    for num_made in (1, 2):  # of rows, pages and their table
        num_left = num_made
        with make() as buffer:
            if has_begun:
                with pytest.raises(ValueError, match="at least 0"):
                    buffer.update(mini_batch(0) | {"label": torch.full((6,), -1)})
            monkeypatch.setattr(LocalTransport, "make_shard", without_memory)
            with pytest.raises(CheckpointError, match="so many pages do not fit"):
                buffer.load_state_dict(state)
            monkeypatch.undo()
            assert buffer.stats().shard_bytes == 0
            train(buffer, 0, range(4))
            check_consistent(buffer)


def test_a_load_that_fails_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as buffer:
        train(buffer, 0, range(9))
        state = buffer.state_dict()
    with make() as buffer:
        monkeypatch.setattr(PagedShard, "write", lambda *_, **__: 1 / 0)
        with pytest.raises(CheckpointError, match="division by zero"):
            buffer.load_state_dict(state)
        monkeypatch.undo()
        assert buffer.stats().shard_bytes == 0
        train(buffer, 0, range(4))
        check_consistent(buffer)


def test_the_same_buffer_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    """Whatever was there before, and so whichever pages hold it."""
    with make() as buffer:
        train(buffer, 0, range(30))
        state = buffer.state_dict()
        buffer.save(tmp_path / "first")
    with make() as buffer:
        buffer.load(tmp_path / "first")
        buffer.save(tmp_path / "again")
        again = buffer.state_dict()
    files = [
        json.loads((tmp_path / name / "manifest.json").read_text())["files"]
        for name in ("first", "again")
    ]
    assert [each["sha256"] for each in files[0]] == [each["sha256"] for each in files[1]]
    assert state["rank_0"][0] == again["rank_0"][0]
    for name, tensor in state["rank_0"][1].items():
        assert torch.equal(tensor, again["rank_0"][1][name]), name


def test_what_is_needed_on_the_disk_is_what_all_ranks_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(2)

    def rank_main(end: Transport) -> None:
        with make(end, capacity_bytes=400_000) as buffer:
            buffer.fill([mini_batch(step, 0) for step in range(9)] * (1 - end.rank))
            assert buffer.stats().held_per_rank == [25, 0]
            for free, message in ((20_000, None), (4_000, "GB free, but the buffer needs")):
                barrier.wait(30.0)
                usage = SimpleNamespace(free=free)
                monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder, u=usage: u)
                barrier.wait(30.0)
                if message is None:
                    buffer.save(tmp_path)
                    continue
                with pytest.raises(CheckpointError, match=message):
                    buffer.save(tmp_path)

    run_ranks(LocalTransport.connect(2), rank_main)


def test_a_policy_of_the_library_s_own_is_not_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as buffer:
        train(buffer, 0, range(3))
        monkeypatch.setattr(WithinBytes, "restore", lambda *_: 1 / 0)
        buffer.state_dict()


def test_before_the_first_round_and_without_a_bound(tmp_path: Path) -> None:
    with make() as buffer:
        train(buffer, 0, range(3))
        buffer.save(tmp_path)
    with (
        RehearsalBuffer(50, num_representatives=3, label="label") as buffer,
        pytest.raises(CheckpointError, match=r"\['bag'\] holds .* Give capacity_bytes="),
    ):
        buffer.load(tmp_path)
    with (
        make() as buffer,
        pytest.raises(CheckpointError, match="convert: samples of unequal length cannot be"),
    ):
        buffer.load(tmp_path, convert=lambda batch: batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_bytes": 100}, "pages of 100 bytes"),
        ({"page_bytes": 64}, "pages"),
        ({"page_bytes": 256}, "its pages have not 256 bytes"),
        ({"other": 1}, "TypeError"),
    ],
)
def test_a_manifest_that_says_something_else(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with make() as buffer:
        train(buffer, 0, range(9))
        buffer.save(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    assert content["format_version"] == 2
    content["layout"]["paging"] |= changes
    path.write_text(json.dumps(with_checksum(content)))
    with make() as buffer:
        with pytest.raises(CheckpointError, match=message):
            buffer.load(tmp_path)
        train(buffer, 0, range(3))


def test_samples_of_one_size_within_a_bound_of_bytes(tmp_path: Path) -> None:
    def bounded(capacity_bytes: int) -> RehearsalBuffer:
        return RehearsalBuffer(99, num_representatives=2, capacity_bytes=capacity_bytes)

    batch = torch.arange(10.0).view(5, 2), torch.arange(5) % 2
    with bounded(16 * 8) as buffer:
        for _ in range(4):
            buffer.update(batch)
        buffer.save(tmp_path)
        expected = buffer.update(batch)
    for size, num_held in ((8, 8), (5, 5), (20, 8)):
        with bounded(16 * size) as buffer:
            buffer.load(tmp_path)
            assert len(buffer) == num_held
            if size == 8:
                assert torch.equal(buffer.update(batch)[0], expected[0])


def test_a_whole_state_where_ranks_have_saved_different_arrays() -> None:
    """One representative is protected, so on one rank alone; the other has forgotten all that."""

    def rank_main(end: Transport) -> tuple[dict[str, Any], list[int]]:
        with make(end, selection="reservoir") as buffer:
            train(buffer, end.rank, range(9))
            assert buffer.protect(0.02) == 1
            train(buffer, end.rank, range(9, 60))
            return buffer.state_dict(whole=True), numbers_in(buffer)

    (state, first), (own, second) = run_ranks(LocalTransport.connect(2, 20.0), rank_main)
    assert set(state) == {"rank_0", "rank_1"}
    assert state["rank_0"][1].keys() != state["rank_1"][1].keys()
    for name, tensor in own["rank_1"][1].items():
        assert torch.equal(state["rank_1"][1][name], tensor), name
    with make(capacity_bytes=40_000, selection="reservoir") as buffer:
        buffer.load_state_dict(state)
        assert sorted(numbers_in(buffer)) == sorted(first + second)


@pytest.mark.parametrize("selection", ["reservoir", "fifo", "class-balanced"])
def test_from_many_ranks_onto_one_and_back(selection: str, tmp_path: Path) -> None:
    """Each rank was offered fewer than all of them hold."""

    def rank_main(end: Transport, steps: range) -> list[int]:
        with make(end, 40_000, selection=selection) as buffer:
            if steps.start:
                buffer.load(tmp_path)
            held = numbers_in(buffer)
            for step in steps:
                buffer.update(mini_batch(step, end.rank))
            buffer.save(tmp_path)
            return held if steps.start else numbers_in(buffer)

    before = list(
        chain(*run_ranks(LocalTransport.connect(4), lambda end: rank_main(end, range(2))))
    )
    assert len(before) == 48
    for num_ranks in (1, 3, 1):
        found = run_ranks(
            LocalTransport.connect(num_ranks), lambda end: rank_main(end, range(2, 2))
        )
        assert sorted(chain(*found)) == sorted(before)
    gone = before[5]
    assert forget(tmp_path, {"number": gone}).num_removed == 1
    with make(capacity_bytes=40_000, selection=selection) as buffer:
        buffer.load(tmp_path)
        train(buffer, 0, range(20, 24))
        check_consistent(buffer)
