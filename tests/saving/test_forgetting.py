"""Forgetting: what is removed from a saved buffer is gone, and what is left goes on by the laws."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ritornello
from ritornello import CheckpointError, RehearsalBuffer, SavedFolder, forget
from ritornello.policies.names import SAMPLING_POLICIES as SAMPLINGS
from ritornello.policies.names import SELECTION_POLICIES as SELECTIONS
from ritornello.saving import forgetting
from ritornello.saving.files import lock
from ritornello.testing import chi_square_p_value, run_ranks
from ritornello.transports import LocalTransport, Transport

STRIDE = 0x5DEECE66D
"""Numbers of samples are multiples of it: their bytes occur nowhere by accident."""

CAPACITY = 30


def batch_of(step: int, rank: int = 0, num_samples: int = 6) -> dict[str, Any]:
    """Samples that all differ; four classes in turn."""
    positions = (step * 8 + rank) * 64 + torch.arange(num_samples)
    numbers = (1 + positions) * STRIDE
    return {
        "image": numbers[:, None].repeat(1, 3),
        "label": positions % 4,
        "meta": {"id": numbers, "user": (positions % 5).to(torch.uint8)},
    }


def make(end: Transport | None = None, **arguments: Any) -> RehearsalBuffer:
    given: dict[str, Any] = {"num_representatives": 3, "label": "label", "seed": 5, **arguments}
    given.setdefault("capacity", CAPACITY)
    return RehearsalBuffer(transport=end or "local", **given)


def on_ranks(num_ranks: int, rank_main: Callable[[Transport], Any]) -> list[Any]:
    return run_ranks(LocalTransport.connect(num_ranks, 30.0), rank_main)


def save(folder: Path, num_ranks: int = 2, num_steps: int = 20, **arguments: Any) -> None:
    """Saves a buffer after some steps, of which each five are a task."""

    def rank_main(end: Transport) -> None:
        with make(end, **arguments) as buffer:
            for step in range(num_steps):
                if step % 5 == 0:
                    buffer.begin_task(f"day {step // 5}")
                buffer.update(batch_of(step, end.rank))
            buffer.save(folder)

    on_ranks(num_ranks, rank_main)


def read(folder: Path) -> list[tuple[int, int, int]]:
    """Number, label and task of everything held, in the order of shards and slots."""
    saved = SavedFolder(folder)
    return [
        each
        for rank in range(saved.manifest.num_ranks)
        for part in saved.representatives(rank)
        for each in zip(
            part.batch["meta"]["id"].tolist(),
            part.batch["label"].tolist(),
            part.tasks.tolist(),
            strict=True,
        )
    ]


def numbers_in(folder: Path) -> list[int]:
    return [number for number, _, _ in read(folder)]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_anywhere(folder: Path, numbers: Sequence[int]) -> bool:
    """Whether some byte of the folder still tells of a sample."""
    contents = b"".join(files_in(folder).values())
    return any(
        number.to_bytes(8, "little") in contents or str(number).encode() in contents
        for number in numbers
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_left_goes_on_with_all_policies_on_any_number_of_ranks(
    selection: str, sampling: str, tmp_path: Path
) -> None:
    arguments = {"selection": selection, "sampling": sampling, "num_draws": 2}
    nums_drawn = range(0, 7, 2) if sampling == "earlier-tasks" else [6]  # what is left of them
    save(tmp_path, 2, **arguments)
    before = read(tmp_path)
    outcome = forget(tmp_path, {"label": [1, 2]})
    removed = [number for number, label, _ in before if label in (1, 2)]
    assert outcome.num_removed == len(removed) > 0
    assert not is_anywhere(tmp_path, removed)
    kept = sorted(number for number, label, _ in before if label not in (1, 2))
    assert sorted(numbers_in(tmp_path)) == kept
    for num_ranks in (1, 2, 3):

        def rank_main(end: Transport) -> tuple[list[int], list[int]]:
            with make(end, **arguments) as buffer:
                buffer.load(tmp_path)
                loaded = [int(n) for part in buffer.representatives() for n in part["meta"]["id"]]
                assert len(buffer) == len(kept)
                drawn = buffer.update(batch_of(100, end.rank))["meta"]["id"][6:].tolist()
                for step in range(101, 115):
                    assert len(buffer.update(batch_of(step, end.rank))["label"]) - 6 in nums_drawn
                assert len(buffer) == CAPACITY
                return loaded, drawn

        ranks = on_ranks(num_ranks, rank_main)
        assert sorted(number for loaded, _ in ranks for number in loaded) == kept
        for _, drawn in ranks:
            assert len(drawn) in nums_drawn
            assert set(drawn) <= set(kept)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_old_goes_before_the_room_is_in_use(
    selection: str, num_ranks: int, tmp_path: Path
) -> None:
    save(tmp_path, 1, selection=selection)
    forget(tmp_path, {"meta.user": 3})
    kept = set(numbers_in(tmp_path))
    room = CAPACITY - len(kept)
    assert room >= 4

    def rank_main(end: Transport) -> list[int]:
        with make(end, selection=selection) as buffer:
            buffer.load(tmp_path)
            room_here = CAPACITY // num_ranks - buffer.stats().held_per_rank[end.rank]
            buffer.update(batch_of(100, end.rank, room_here))
            assert len(buffer) == CAPACITY
            return [int(n) for part in buffer.representatives() for n in part["meta"]["id"]]

    held = {number for of_rank in on_ranks(num_ranks, rank_main) for number in of_rank}
    assert kept < held


def test_classes_come_back_to_equal_shares(tmp_path: Path) -> None:
    save(tmp_path, 1, num_steps=60)
    forget(tmp_path, {"label": 2})
    with make() as buffer:
        buffer.load(tmp_path)
        for step in range(100, 140):
            buffer.update(batch_of(step))
        assert sorted(buffer.stats().held_per_class.values()) == [7, 7, 8, 8]


def test_every_one_left_is_equally_likely_to_be_drawn(tmp_path: Path) -> None:
    """With a false alarm in 1,000 seeds."""
    save(tmp_path, 2)
    forget(tmp_path, {"meta.user": [0, 1]})
    kept = numbers_in(tmp_path)
    num_steps = 400

    def rank_main(end: Transport) -> list[int]:
        with make(end) as buffer:
            buffer.load(tmp_path)
            drawn = []
            for step in range(num_steps):
                empty = batch_of(100 + step, end.rank, 0)
                drawn += buffer.update(empty)["meta"]["id"].tolist()
            return drawn

    drawn = [number for of_rank in on_ranks(2, rank_main) for number in of_rank]
    assert set(drawn) == set(kept)
    counts = np.array([drawn.count(number) for number in kept])
    assert chi_square_p_value(counts, 2 * 3 * num_steps / len(kept)) > 0.001


def test_fifo_still_replaces_the_oldest(tmp_path: Path) -> None:
    save(tmp_path, 1, selection="fifo", num_steps=11)
    before = sorted(numbers_in(tmp_path))
    assert numbers_in(tmp_path) != before  # it has gone round
    forget(tmp_path, {"meta.id": before[3:8]})
    assert numbers_in(tmp_path) == before[:3] + before[8:]
    with make(selection="fifo") as buffer:
        buffer.load(tmp_path)
        for step, size in ((100, 5), (101, 3)):
            buffer.update(batch_of(step, 0, size))
        held = [int(n) for part in buffer.representatives() for n in part["meta"]["id"]]
    assert sorted(held)[:22] == before[8:]


def test_the_same_part_of_what_was_offered_is_forgotten() -> None:
    policy = SELECTIONS["reservoir"]()
    state, kept = policy.forget({"offered": np.array([1000])}, 10, np.array([2, 5]))
    assert state["offered"].tolist() == [800]
    assert kept.tolist() == [0, 1, 3, 4, 6, 7, 8, 9]
    policy = SELECTIONS["class-balanced"]()
    before = {
        "labels": np.array([7, 3, 5]),
        "offered": np.array([2, 30, 9]),
        "counts": np.array([2, 3, 1]),
        "grows": np.array([1, 0, 0]),
        "slots": np.array([5, 0, 1, 4, 2, 3]),
    }
    state, kept = policy.forget(before, 6, np.array([3, 4, 5]))
    assert {name: each.tolist() for name, each in state.items()} == {
        "labels": [7, 3, 5],
        "offered": [1, 20, 0],  # what was stored whole, one for each
        "counts": [1, 2, 0],
        "grows": [1, 1, 1],
        "slots": [0, 1, 2],
    }
    assert kept.tolist() == [0, 1, 2]


def test_conditions_must_all_hold(tmp_path: Path) -> None:
    save(tmp_path, 2, selection="reservoir", num_steps=18)
    before = read(tmp_path)
    meant = [number for number, label, task in before if label == 3 and task in (1, 2)]
    asked = {"label": 3, "task": "day 1, day 2"}
    assert forget(tmp_path, asked, dry_run=True).removed_per_class == {3: len(meant)}
    outcome = forget(tmp_path, asked)
    assert outcome.num_removed == len(meant) > 0
    assert sum(outcome.removed_per_task.values()) == len(meant)
    assert set(outcome.removed_per_task) <= {"day 1", "day 2"}
    assert sorted(numbers_in(tmp_path)) == sorted(n for n, _, _ in before if n not in meant)
    assert forget(tmp_path, asked, dry_run=True).num_removed == 0


def test_a_task_whose_name_has_a_comma_in_it(tmp_path: Path) -> None:
    with make() as buffer:
        for step, name in enumerate(("cat, dog", "cat", "dog")):
            buffer.begin_task(name)
            buffer.update(batch_of(step))
        buffer.save(tmp_path)
    assert forget(tmp_path, {"task": "cat, dog"}, dry_run=True).removed_per_task == {"cat, dog": 6}
    outcome = forget(tmp_path, {"task": ["cat", "dog"]}, dry_run=True)
    assert outcome.removed_per_task == {"cat": 6, "dog": 6}


@pytest.mark.parametrize("name", ["meta.user", "batch['meta']['user']"])
def test_a_field_by_its_keys_or_as_the_layout_writes_it(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    outcome = forget(tmp_path, {name: "2, 4"})
    assert outcome.num_removed > 0
    (removal,) = SavedFolder(tmp_path).manifest.removals
    assert list(removal.where) == ["meta.user"]


def test_a_field_by_its_index(tmp_path: Path) -> None:
    with RehearsalBuffer(9, num_representatives=1) as buffer:
        buffer.update((torch.zeros(4), torch.arange(4), torch.arange(4) * 10))
        buffer.save(tmp_path)
    assert forget(tmp_path, {"2": 30}).removed_per_class == {3: 1}


def test_numbers_above_all_signed_ones(tmp_path: Path) -> None:
    ids = torch.tensor([2**64 - 1, 2**63, 5], dtype=torch.uint64)
    with RehearsalBuffer(9, num_representatives=1) as buffer:
        buffer.update({1: torch.arange(3), "id": ids})
        buffer.save(tmp_path)
    assert forget(tmp_path, {"id": 2**64 - 1}).removed_per_class == {0: 1}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "where: give a condition"),
        ({"name": 1}, "where name: no field has that name; there are label, task, label (batch"),
        ({"image": 1}, "where image: the field batch['image']: torch.int64 [3] per sample must be"),
        ({"label": "one"}, "where label=one: it must be an integer"),
        (
            {"meta.user": 256},
            "where meta.user=256: the field is batch['meta']['user']: torch.uint8",
        ),
    ],
)
def test_conditions_that_samples_cannot_meet(
    where: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path, 1, num_steps=2)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        forget(tmp_path, where)
    assert files_in(tmp_path) == before


def test_a_task_that_is_misspelt_is_named(tmp_path: Path) -> None:
    with RehearsalBuffer(9, num_representatives=1, selection="fifo", label=None) as buffer:
        for name in ("one", "two"):
            buffer.begin_task(name)
            buffer.update((torch.zeros(4), torch.arange(4)))
        buffer.save(tmp_path)
    before = files_in(tmp_path)
    for task in ("twoo", "one,twoo"):
        with pytest.raises(ValueError, match=r"no task is named \['twoo'\]; there are"):
            forget(tmp_path, {"task": task})
    assert files_in(tmp_path) == before


def test_a_buffer_without_tasks_or_label(tmp_path: Path) -> None:
    with RehearsalBuffer(9, num_representatives=1, selection="fifo", label=None) as buffer:
        buffer.update((torch.zeros(4), torch.arange(4)))
        buffer.save(tmp_path)
    with pytest.raises(ValueError, match="the saved buffer knows no tasks"):
        forget(tmp_path, {"task": "x"})
    with pytest.raises(ValueError, match="does not know which field is the class label"):
        forget(tmp_path, {"label": 1})
    outcome = forget(tmp_path, {"1": 2})
    assert (outcome.num_removed, outcome.removed_per_class) == (1, {})


def test_before_the_first_mini_batch_there_is_nothing_to_forget(tmp_path: Path) -> None:
    with make() as buffer:
        buffer.save(tmp_path)
    assert forget(tmp_path, {"label": 1, "anything": 2}).num_removed == 0


def test_all_that_there_is(tmp_path: Path) -> None:
    save(tmp_path, 2, sampling="class-balanced")
    outcome = forget(tmp_path, {"label": [0, 1, 2, 3]})
    assert (outcome.num_removed, outcome.num_left) == (CAPACITY, 0)

    def rank_main(end: Transport) -> None:
        with make(end, sampling="class-balanced") as buffer:
            buffer.load(tmp_path)
            assert len(buffer.update(batch_of(50, end.rank))["label"]) == 6
            assert len(buffer.update(batch_of(51, end.rank))["label"]) == 9

    on_ranks(2, rank_main)


def test_the_manifest_proves_it_and_goes_on_proving_it(tmp_path: Path) -> None:
    save(tmp_path, 2)
    number = numbers_in(tmp_path)[4]
    outcome = forget(tmp_path, {"meta.id": number, "label": [0, 1, 2, 3]})
    assert outcome.num_removed == 1
    assert not is_anywhere(tmp_path, [number])
    (removal,) = SavedFolder(tmp_path).manifest.removals
    text = f"meta.id={number} {outcome.receipt}"
    assert removal.where == {
        "meta.id": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
        "label": "0,1,2,3",
    }
    assert (removal.num_removed, removal.num_left) == (1, CAPACITY - 1)
    assert forget(tmp_path, {"label": 0}).receipt == ""

    def rank_main(end: Transport) -> None:
        with make(end) as buffer:
            buffer.load(tmp_path)
            buffer.update(batch_of(50, end.rank))
            buffer.save(tmp_path)

    on_ranks(2, rank_main)
    assert [each.num_removed for each in SavedFolder(tmp_path).manifest.removals][:1] == [1]
    assert len(SavedFolder(tmp_path).manifest.removals) == 2


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 2)
    before = files_in(tmp_path)
    assert forget(tmp_path, {"label": 1}, dry_run=True).num_removed > 0
    assert files_in(tmp_path) == before


def test_loading_twice_gives_the_same(tmp_path: Path) -> None:
    save(tmp_path, 2)
    forget(tmp_path, {"label": 1})

    def rank_main(end: Transport) -> list[int]:
        with make(end) as buffer:
            buffer.load(tmp_path)
            batches = [buffer.update(batch_of(step, end.rank)) for step in range(50, 60)]
            return torch.cat([batch["meta"]["id"] for batch in batches]).tolist()

    assert on_ranks(2, rank_main) == on_ranks(2, rank_main)


def test_distances_stay_with_their_representatives(tmp_path: Path) -> None:
    def embed(batch: dict[str, Any]) -> torch.Tensor:
        numbers = batch["meta"]["id"] // STRIDE
        return torch.stack([numbers.double().cos(), numbers.double().sin()], dim=1)

    def rank_main(end: Transport) -> None:
        with make(end, sampling="grasp") as buffer:
            for step in range(20):
                buffer.update(batch_of(step, end.rank))
            buffer.measure_distances(embed)
            buffer.save(tmp_path)

    def distances() -> dict[int, float]:
        saved = SavedFolder(tmp_path)
        with saved.shard(1) as shard:
            places = shard.arrays()["contents.distances"]
        room = CAPACITY // 2
        held = [places[room * rank :][:n] for rank, n in enumerate(saved.manifest.held_per_rank)]
        return dict(zip(numbers_in(tmp_path), np.concatenate(held).tolist(), strict=True))

    on_ranks(2, rank_main)
    before = distances()
    forget(tmp_path, {"label": 1})
    after = distances()
    assert len(after) < len(before)
    assert after == {number: before[number] for number in after}


@pytest.mark.parametrize("moment", ["new_shard_file", "replace_manifest"])
def test_an_error_on_the_way_leaves_all_as_it_was(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    before = files_in(tmp_path)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forgetting, moment, fail)
    with pytest.raises(CheckpointError, match="could not be rewritten: .*No space left"):
        forget(tmp_path, {"label": 1})
    assert files_in(tmp_path) == before


def test_a_crash_before_the_old_files_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    removed = [number for number, label, _ in read(tmp_path) if label == 1]

    def crash(folder: Path) -> None:
        raise KeyboardInterrupt

    calls = iter([forgetting.remove_leftovers, crash])
    monkeypatch.setattr(forgetting, "remove_leftovers", lambda folder: next(calls)(folder))
    with pytest.raises(KeyboardInterrupt):
        forget(tmp_path, {"label": 1})
    monkeypatch.undo()
    assert not {number for number, _, _ in read(tmp_path)} & set(removed)
    assert is_anywhere(tmp_path, removed)
    assert forget(tmp_path, {"label": 1}).num_removed == 0
    assert not is_anywhere(tmp_path, removed)


def test_a_damaged_file_is_not_rewritten(tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = tmp_path / SavedFolder(tmp_path).manifest.files[1].name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    before = files_in(tmp_path)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged: its SHA-256"):
        forget(tmp_path, {"label": 1})
    assert files_in(tmp_path) == before


def test_a_state_that_contradicts_itself(tmp_path: Path) -> None:
    save(tmp_path, 1)
    _rewrite_array(tmp_path, "policy.slots", np.zeros(CAPACITY, np.int64))
    with pytest.raises(CheckpointError, match="cannot be understood: slots must be those"):
        forget(tmp_path, {"label": 1})
    save(tmp_path, 1, sampling="class-balanced")
    _rewrite_array(tmp_path, "contents.places", np.full(CAPACITY, 99))
    with pytest.raises(CheckpointError, match="cannot be understood: places must be"):
        forget(tmp_path, {"label": 1})


def test_where_there_is_no_buffer_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no saved buffer: it has no manifest.json"):
        forget(tmp_path, {"label": 1})
    with pytest.raises(CheckpointError, match="holds no saved buffer: there is no such folder"):
        forget(tmp_path / "misspelt", {"label": 1})
    assert not list(tmp_path.iterdir())


def test_while_another_job_saves_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    descriptor = lock(tmp_path)
    try:
        with pytest.raises(CheckpointError, match="another job is saving"):
            forget(tmp_path, {"label": 1})
    finally:
        os.close(descriptor)


def test_no_room_for_a_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = files_in(tmp_path)
    monkeypatch.setattr(
        forgetting.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100})
    )
    with pytest.raises(CheckpointError, match="GB free, but needs"):
        forget(tmp_path, {"label": 1})
    assert files_in(tmp_path) == before


class Own(ritornello.Fifo):
    """A policy of one's own."""


class Forgetless(ritornello.SelectionPolicy):
    def admit(self, labels: Any, generator: np.random.Generator) -> ritornello.Assignment:
        rows = np.arange(min(len(labels), self.num_slots))
        return ritornello.Assignment(rows, rows)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], size: int) -> None:
        pass


def test_policies_of_ones_own(tmp_path: Path) -> None:
    save(tmp_path, 1, selection=Own())
    with pytest.raises(CheckpointError, match=r"policy Own\(\), which is none of Ritornello's"):
        forget(tmp_path, {"label": 1})
    assert forget(tmp_path, {"label": 1}, selection=Own()).num_removed > 0
    save(tmp_path, 1, selection=Forgetless())
    with pytest.raises(CheckpointError, match="Forgetless cannot forget: it has no method forget"):
        forget(tmp_path, {"label": 1}, selection=Forgetless())


def test_policies_with_settings(tmp_path: Path) -> None:
    def policy() -> ritornello.ClassBalanced:
        return ritornello.ClassBalanced(num_classes=4, shares="fixed")

    save(tmp_path, 1, selection=policy())
    forget(tmp_path, {"label": 1})
    with make(selection=policy()) as buffer:
        buffer.load(tmp_path)
        for step in range(50, 60):
            buffer.update(batch_of(step))
        assert sorted(buffer.stats().held_per_class.values()) == [7, 7, 8, 8]


def test_reading_what_is_saved(tmp_path: Path) -> None:
    def rank_main(end: Transport) -> list[dict[str, Any]]:
        with make(end) as buffer:
            buffer.update(batch_of(0, end.rank))
            buffer.begin_task("second")
            buffer.update(batch_of(1, end.rank))
            buffer.save(tmp_path)
            return list(buffer.representatives())

    held = on_ranks(2, rank_main)
    saved = SavedFolder(tmp_path)
    for rank, (expected,) in enumerate(held):
        (part,) = saved.representatives(rank)
        assert torch.equal(part.batch["image"], expected["image"])
        assert torch.equal(part.batch["meta"]["user"], expected["meta"]["user"])
        assert part.labels is not None
        assert part.labels.tolist() == expected["label"].tolist()
        assert part.slots.tolist() == list(range(12))
        assert part.admitted_in.tolist() == [0] * 6 + [1] * 6
        assert part.tasks.tolist() == [-1] * 6 + [0] * 6
        (part,) = saved.representatives(rank, np.array([7, 2]))
        ids = expected["meta"]["id"]
        assert dict(zip(part.slots.tolist(), part.batch["meta"]["id"].tolist(), strict=True)) == {
            7: int(ids[7]),
            2: int(ids[2]),
        }
    with pytest.raises(IndexError, match="the slots from 0 to 11"):
        list(saved.representatives(0, np.array([12])))


def test_reading_is_done_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ritornello.saving.shard_file.PIECE_BYTES", 200)
    monkeypatch.setattr("ritornello.saving.forgetting.PIECE_BYTES", 200)
    save(tmp_path, 1, selection="fifo", num_steps=11)
    assert len(list(SavedFolder(tmp_path).representatives(0))) > 5
    before = sorted(numbers_in(tmp_path))
    forget(tmp_path, {"meta.id": before[1::2]})
    assert numbers_in(tmp_path) == before[::2]


def _rewrite_array(folder: Path, name: str, array: np.ndarray) -> None:
    """Puts another array into the first shard, with a checksum that fits."""
    manifest = SavedFolder(folder).manifest
    path = folder / manifest.files[0].name
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    first, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    changed = bytearray(content)
    changed[8 + length + first : 8 + length + end] = array.tobytes()
    path.write_bytes(changed)
    file = manifest.files[0].__class__(path.name, len(changed), hashlib.sha256(changed).hexdigest())
    (folder / "manifest.json").write_text(
        manifest.with_files((file,), manifest.save_id, manifest.saved_at).as_json()
    )
