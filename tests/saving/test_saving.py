"""Saving and loading: exactly as if nothing had happened, or on other ranks without a loss."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_streams import (
    Augmented,
    assert_same,
    batch_of,
    counts_of,
    held,
    joined,
    loaded_on,
    make,
    on_ranks,
    run_on,
    saved_after,
)

from ritornello import (
    Assignment,
    BufferClosedError,
    CheckpointError,
    ClassBalanced,
    RehearsalBuffer,
    SavedFolder,
    SelectionPolicy,
)
from ritornello.testing import chi_square_p_value, connect_shared_memory, run_ranks
from ritornello.transports import LocalTransport, Transport

VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "fixed shares": {"selection": lambda: ClassBalanced(9, shares="fixed")},
    "per-class-random": {"selection": "per-class-random"},
    "greedy-balanced": {"selection": "greedy-balanced"},
    "first-offered": {"selection": "first-offered"},
    "reservoir": {"selection": "reservoir", "num_draws": 2},
    "fifo": {"selection": "fifo", "asynchronous": False},
    "cbrs": {"selection": "class-balanced-reservoir", "sampling": "class-balanced"},
    "grasp": {"selection": "grasp", "sampling": "grasp"},
}


# The same ranks.


@pytest.mark.parametrize("num_steps", [0, 1, 7, 50])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_goes_on_bit_for_bit(
    variant: str, num_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In pieces of three records, so that rounds overwrite what is not yet on disk.
    monkeypatch.setattr("ritornello.saving.writing.PIECE_BYTES", 48)
    num_later = 15

    def undisturbed(end: Transport) -> Augmented:
        with make(end, **VARIANTS[variant]) as buffer:
            return run_on(buffer, end.rank, range(num_steps + num_later))

    def saving(end: Transport) -> tuple[Augmented, dict[str, Any]]:
        with make(end, **VARIANTS[variant]) as buffer:
            run_on(buffer, end.rank, range(num_steps))
            buffer.save(tmp_path / "at once")
            state = buffer.state_dict()
            buffer.save(tmp_path / "beside", background=True)
            rest = run_on(buffer, end.rank, range(num_steps, num_steps + num_later))
            buffer.wait_until_saved()
            return rest, state

    wanted = [augmented[num_steps:] for augmented in on_ranks(3, undisturbed)]
    saved = on_ranks(3, saving)

    def loading(end: Transport, source: str) -> Augmented:
        with make(end, **VARIANTS[variant]) as buffer:
            if source == "state_dict":
                buffer.load_state_dict(saved[end.rank][1])
            else:
                buffer.load(tmp_path / source)
            return run_on(buffer, end.rank, range(num_steps, num_steps + num_later))

    for rank in range(3):
        assert_same(saved[rank][0], wanted[rank])
    for source in ("at once", "beside", "state_dict"):
        again = on_ranks(3, lambda end, source=source: loading(end, source))
        for rank in range(3):
            assert_same(again[rank], wanted[rank])


def test_a_buffer_in_use_takes_over_another_one(tmp_path: Path) -> None:
    def rank_main(end: Transport) -> None:
        with make(end) as buffer:
            run_on(buffer, end.rank, range(30))
            buffer.save(tmp_path)
            before = held(buffer)
            wanted = run_on(buffer, end.rank, range(30, 60))
            for _ in range(2):  # back in time, twice
                buffer.load(tmp_path)
                assert held(buffer) == before
                assert_same(run_on(buffer, end.rank, range(30, 60)), wanted)

    run_ranks(connect_shared_memory(2), rank_main)


def test_draw_and_offer_are_saved_in_between(tmp_path: Path) -> None:
    with make(LocalTransport()) as buffer:
        buffer.offer(batch_of(0, 0))
        first = buffer.draw()
        buffer.save(tmp_path)
        buffer.offer(batch_of(1, 0))
        wanted = buffer.draw()
    with make(LocalTransport()) as buffer:
        buffer.load(tmp_path)
        buffer.offer(batch_of(1, 0))
        assert_same([buffer.draw()], [wanted])
    assert first is not None


def test_saves_replace_one_another(tmp_path: Path) -> None:
    with make(LocalTransport()) as buffer:
        for step in range(3):
            buffer.update(batch_of(step, 0))
            buffer.save(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert names == {"manifest.json", ".lock", manifest["files"][0]["name"]}


def test_close_writes_what_is_left_of_a_save(tmp_path: Path) -> None:
    def rank_main(end: Transport) -> list[tuple[int, int]]:
        with make(end, num_candidates=None) as buffer:
            run_on(buffer, end.rank, range(20))
            buffer.save(tmp_path, background=True)
            return held(buffer)

    wanted = joined(on_ranks(2, rank_main))
    assert sorted(joined(loaded_on(tmp_path, 2, num_candidates=None))) == sorted(wanted)


def test_a_save_needs_no_second_copy_of_the_shard(tmp_path: Path) -> None:
    images = torch.zeros(64, 2**16, dtype=torch.uint8)
    with RehearsalBuffer(1000, num_representatives=2) as buffer:
        while len(buffer) < 1000:
            buffer.update((images, torch.arange(64)))
        assert buffer.stats().shard_bytes > 64e6
        tracemalloc.start()
        try:
            buffer.save(tmp_path)
            buffer.load(tmp_path)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 16e6


# What is in a file.


def test_files_are_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    wanted = saved_after(tmp_path, 2, 30)
    numbers = []
    for path in tmp_path.glob("*.safetensors"):
        rows = safetensors.load_file(path)["rows"]
        words = rows.view(torch.int64)
        numbers += list(zip(words[:, 0].tolist(), words[:, 1].tolist(), strict=True))
    assert sorted(numbers) == sorted(wanted)


Point = namedtuple("Point", "x y")


def test_any_sample_is_saved(tmp_path: Path) -> None:
    batch = {
        "image": torch.arange(24, dtype=torch.float16).view(4, 2, 3),
        3: [torch.arange(4, dtype=torch.bfloat16), (torch.ones(4, 0), torch.arange(4) > 1)],
        "point": Point(torch.arange(4).to(torch.complex64), torch.arange(4, dtype=torch.int8)),
    }
    arguments: dict[str, Any] = {"label": ("point", 1), "num_representatives": 3}
    with RehearsalBuffer(4, **arguments) as buffer:
        buffer.update(batch)
        buffer.save(tmp_path)
        wanted = buffer.update(batch)
    with RehearsalBuffer(4, **arguments) as buffer:
        buffer.load(tmp_path)
        (drawn,) = buffer.representatives()
        assert type(drawn["point"]) is tuple  # no class is made up from a file
        again = buffer.update(batch)
        assert type(again["point"]) is Point
    assert torch.equal(again["image"], wanted["image"])
    assert again[3][0].dtype == torch.bfloat16
    assert again[3][1][0].shape == (7, 0)
    assert torch.equal(again["point"].x, wanted["point"].x)


def test_keys_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    with RehearsalBuffer(4, num_representatives=1, label=(2.5,)) as buffer:
        buffer.update({2.5: torch.arange(3)})
        with pytest.raises(CheckpointError, match=r"key 2\.5: a buffer can be saved if all keys"):
            buffer.save(tmp_path)
        buffer.update({2.5: torch.arange(3)})  # it goes on


def test_tasks_and_rounds_of_admission_are_saved(tmp_path: Path) -> None:
    with make(LocalTransport(), num_candidates=None) as buffer:
        buffer.begin_task("monday")
        run_on(buffer, 0, range(4))
        buffer.begin_task("tuesday")
        run_on(buffer, 0, range(4, 6))
        buffer.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    marks = [(each["name"], each["first_round"]) for each in manifest["tasks"]]
    assert marks == [("monday", 0), ("tuesday", 4)]

    def rank_main(end: Transport) -> None:
        with make(end, num_candidates=None) as buffer:
            buffer.load(tmp_path)
            (_, tensors) = buffer.state_dict()[f"rank_{end.rank}"]
            numbers = tensors["rows"].view(torch.int64)[:, 0]
            assert torch.equal(tensors["admitted_in"], numbers // (64 * 64))
            assert len(numbers) == 24

    on_ranks(2, rank_main)


# Other ranks, another capacity.


@pytest.mark.parametrize("num_steps", [1, 8, 60])
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_other_ranks_nothing_is_lost_or_doubled(
    variant: str, num_steps: int, tmp_path: Path
) -> None:
    wanted = sorted(saved_after(tmp_path / "4", 4, num_steps, **VARIANTS[variant]))
    folder = tmp_path / "4"
    for num_ranks in (1, 2, 3, 8, 4):

        def rank_main(
            end: Transport, folder: Path = folder, num_ranks: int = num_ranks
        ) -> list[tuple[int, int]]:
            with make(end, **VARIANTS[variant]) as buffer:
                buffer.load(folder)
                own = held(buffer)
                buffer.save(tmp_path / f"{num_ranks} again")
                augmented, _ = buffer.update(batch_of(60, end.rank))
                assert len(augmented) > 8 or not wanted  # drawn at once
                run_on(buffer, end.rank, range(61, 70))
                return own

        parts = on_ranks(num_ranks, rank_main)
        assert sorted(joined(parts)) == wanted
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        if "reservoir" not in variant and variant != "fifo":
            for label in {label for _, label in wanted}:
                of_class = [sum(each == label for _, each in part) for part in parts]
                assert max(of_class) - min(of_class) <= 1
        folder = tmp_path / f"{num_ranks} again"


def test_draws_on_other_ranks_are_fair(tmp_path: Path) -> None:
    """Each representative equally often, with a false-alarm rate of 0.001."""
    num_held = len(saved_after(tmp_path, 4, 60, capacity=48))

    def rank_main(end: Transport) -> list[int]:
        drawn = []
        with make(end, 48) as buffer:
            buffer.load(tmp_path)
            for _ in range(400):
                numbers, _ = buffer.update((torch.zeros(0, dtype=torch.int64),) * 2)
                assert len(set(numbers.tolist())) == 5
                drawn += numbers.tolist()
        return drawn

    for num_ranks in (1, 3, 8):
        _, counts = np.unique(joined(on_ranks(num_ranks, rank_main)), return_counts=True)
        assert len(counts) == num_held == 48
        # Draws without replacement spread less than this test allows for.
        assert chi_square_p_value(counts, counts.mean()) > 0.001


def test_a_smaller_capacity_evicts_by_the_policy(tmp_path: Path) -> None:
    wanted = saved_after(tmp_path, 3, 60)
    for num_ranks in (1, 3):
        kept = joined(loaded_on(tmp_path, num_ranks, capacity=20))
        assert len(kept) == len(set(kept)) == 20
        assert set(kept) <= set(wanted)
        assert set(counts_of([label for _, label in kept]).values()) <= {2, 3}  # 9 classes

    saved_after(tmp_path, 2, 60, selection="fifo", num_candidates=None)
    kept = joined(loaded_on(tmp_path, 3, capacity=20, selection="fifo", num_candidates=None))
    newest = [(int(n), int(c)) for r in (0, 1) for n, c in zip(*batch_of(59, r), strict=True)]
    assert set(newest) <= set(kept)

    every = saved_after(tmp_path, 2, 60, selection="first-offered")
    kept = joined(loaded_on(tmp_path, 1, capacity=30, selection="first-offered"))
    for label in {label for _, label in every}:
        for rank in (0, 1):  # what each offered first
            offered = sorted(n for n, c in every if c == label and n // 64 % 64 == rank)
            first = sorted(n for n, c in kept if c == label and n // 64 % 64 == rank)
            assert first == offered[: len(first)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_larger_capacity_comes_into_use(variant: str, tmp_path: Path) -> None:
    arguments = VARIANTS[variant]
    wanted = saved_after(tmp_path, 2, 60, capacity=40, **arguments)

    def rank_main(end: Transport) -> tuple[list[tuple[int, int]], int]:
        with make(end, 60, **VARIANTS[variant]) as buffer:
            buffer.load(tmp_path)
            before = held(buffer)
            for step in range(10):
                for of_task in range(3):  # all classes come again
                    buffer.update(batch_of(100 + step + 20 * of_task - 100, end.rank))
            return before, len(buffer)

    for num_ranks in (2, 3):
        parts = on_ranks(num_ranks, rank_main)
        assert sorted(joined(part for part, _ in parts)) == sorted(wanted)
        assert parts[0][1] == 60 or variant == "fixed shares"  # then for classes to come


def test_other_arguments_may_change(tmp_path: Path) -> None:
    wanted = saved_after(tmp_path, 2, 30)
    for changes in (
        {"num_representatives": 9},
        {"num_draws": 2},
        {"sampling": "class-balanced"},
        {"seed": 99, "num_candidates": 2},
    ):

        def rank_main(end: Transport, changes: dict[str, Any] = changes) -> None:
            with make(end, **changes) as buffer:
                buffer.load(tmp_path)
                num_drawn = changes.get("num_representatives", 5) * changes.get("num_draws", 1)
                for step in range(30, 36):
                    augmented, _ = buffer.update(batch_of(step, end.rank))
                    assert len(augmented) == 8 + num_drawn
                    if step == 30:
                        assert {int(each) for each in augmented[8:]} <= {n for n, _ in wanted}

        on_ranks(2, rank_main)


def test_a_draw_may_come_first_on_another_capacity(tmp_path: Path) -> None:
    """Saved between draw and offer: the next offer starts a round."""
    with make(LocalTransport()) as buffer:
        for step in range(6):
            buffer.draw()
            buffer.offer(batch_of(step, 0))
        buffer.draw()
        buffer.save(tmp_path)
    with make(LocalTransport(), 60) as buffer:
        buffer.load(tmp_path)
        buffer.offer(batch_of(6, 0))
        assert buffer.draw() is not None


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "fifo"}, "selection=class-balanced, this one selection=fifo"),
        ({"label": 0}, "label=1, this one label=0"),
        (
            {"selection": lambda: ClassBalanced(20)},
            r"this one selection=ClassBalanced\(num_classes=20",
        ),
    ],
)
def test_other_policies_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved_after(tmp_path, 1, 5)
    with (
        make(LocalTransport(), **changes) as buffer,
        pytest.raises(CheckpointError, match=message),
    ):
        buffer.load(tmp_path)


def test_another_layout_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    saved_after(tmp_path, 1, 5)
    with RehearsalBuffer(97, num_representatives=5, num_candidates=4, seed=3) as buffer:
        buffer.update((torch.zeros(3, 2), torch.arange(3)))
        with pytest.raises(CheckpointError, match="holds other samples") as error:
            buffer.load(tmp_path)
        assert "batch[0]: torch.int64 []" in str(error.value)
        assert "batch[0]: torch.float32 [2]" in str(error.value)
        assert len(buffer) == 3
        assert buffer.update((torch.zeros(3, 2), torch.arange(3)))[0].shape == (6, 2)
    with make(LocalTransport()) as buffer:
        buffer.load(tmp_path)
        with pytest.raises(ValueError, match="dtype and shape are fixed"):
            buffer.update((torch.zeros(3, 2), torch.arange(3)))


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    def rank_main(end: Transport) -> None:
        with make(end) as buffer:
            saved_after(tmp_path / str(end.rank), 2, 3) if end.rank == 0 else None
            run_on(buffer, end.rank, range(2))
            with pytest.raises(CheckpointError, match="load failed on rank|no saved buffer"):
                buffer.load(tmp_path / str(end.rank))
            run_on(buffer, end.rank, range(2, 4))
            if end.rank == 0:
                return
            assert len(buffer) > 0

    on_ranks(2, rank_main)


def test_after_close_nothing_is_saved_or_loaded(tmp_path: Path) -> None:
    saved_after(tmp_path, 1, 5)
    buffer = make(LocalTransport())
    buffer.update(batch_of(0, 0))
    state = buffer.state_dict()
    buffer.close()
    for call in (
        lambda: buffer.save(tmp_path),
        lambda: buffer.load(tmp_path),
        lambda: buffer.load_state_dict(state),
    ):
        with pytest.raises(BufferClosedError, match=r"after close\(\)"):
            call()


def test_a_rank_whose_first_mini_batch_was_refused_loads_with_the_others(tmp_path: Path) -> None:
    wanted = sorted(saved_after(tmp_path, 2, 5))

    def rank_main(end: Transport) -> list[tuple[int, int]]:
        with make(end) as buffer:
            if end.rank == 0:
                with pytest.raises(ValueError, match="the label -1 is out of range"):
                    buffer.update((torch.arange(3), torch.arange(3) - 1))
            buffer.load(tmp_path)
            return held(buffer)

    assert sorted(joined(on_ranks(2, rank_main))) == wanted


def test_a_buffer_that_is_not_closed_ends_its_save(tmp_path: Path) -> None:
    buffer = make(LocalTransport())
    buffer.update(batch_of(0, 0))
    wanted = held(buffer)
    buffer.save(tmp_path, background=True)
    del buffer
    gc.collect()
    assert loaded_on(tmp_path, 1) == [wanted]


def test_slots_may_be_read_several_times(tmp_path: Path) -> None:
    wanted = saved_after(tmp_path, 1, 5)
    slots = np.array([0, 0, 2, 1, 5, 3, 3])
    for part in SavedFolder(tmp_path).representatives(0, slots):
        numbers = part.batch[0].tolist()
        assert numbers == [wanted[slot][0] for slot in part.slots.tolist()]


class Everybody(SelectionPolicy):
    def admit(self, labels: Any, generator: np.random.Generator) -> Assignment:
        return Assignment(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


def test_a_policy_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with make(LocalTransport(), selection=Everybody) as buffer:
        buffer.update(batch_of(0, 0))
        with pytest.raises(CheckpointError, match=r"Everybody cannot be saved .* method state\(\)"):
            buffer.save(tmp_path)
        with pytest.raises(CheckpointError, match="Everybody cannot be saved"):
            buffer.state_dict()
        assert len(buffer.update(batch_of(1, 0))[0]) == 9


# state_dict with others' checkpoints.


def test_torch_save_on_one_rank_of_the_whole_state(tmp_path: Path) -> None:
    def saving(end: Transport) -> tuple[list[tuple[int, int]], Augmented]:
        with make(end, sampling="class-balanced") as buffer:
            run_on(buffer, end.rank, range(30))
            state = buffer.state_dict(whole=True)
            assert sorted(state) == [f"rank_{i}" for i in range(3) if end.rank in (0, i)]
            if end.rank == 0:
                torch.save({"buffer": state}, tmp_path / "checkpoint.pt")
            return held(buffer), run_on(buffer, end.rank, range(30, 36))

    saved = on_ranks(3, saving)

    def loading(end: Transport) -> tuple[list[tuple[int, int]], Augmented]:
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        with make(end, sampling="class-balanced") as buffer:
            buffer.load_state_dict(state["buffer"])
            return held(buffer), run_on(buffer, end.rank, range(30, 36))

    for ours, theirs in zip(on_ranks(3, loading), saved, strict=True):
        assert ours[0] == theirs[0]
        assert_same(ours[1], theirs[1])
    everything = sorted(joined(part for part, _ in saved))
    for num_ranks in (1, 4):
        assert sorted(joined(part for part, _ in on_ranks(num_ranks, loading))) == everything


def test_a_state_without_the_needed_ranks_is_refused() -> None:
    with make(LocalTransport()) as buffer:
        buffer.update(batch_of(0, 0))
        state = buffer.state_dict()
    for end in LocalTransport.connect(1):
        with make(end, 50) as buffer:
            buffer.load_state_dict(state)  # another capacity: all ranks are there

    def states(end: Transport) -> dict[str, Any]:
        with make(end) as buffer:
            run_on(buffer, end.rank, range(3))
            return buffer.state_dict()

    saved = on_ranks(2, states)

    def rank_main(end: Transport) -> None:
        own = saved[end.rank]
        with make(end, 50) as buffer:
            with pytest.raises(CheckpointError, match=r"only the rank\(s\).*whole=True"):
                buffer.load_state_dict(own)
            with pytest.raises(CheckpointError, match="the state is empty"):
                buffer.load_state_dict({})
            with pytest.raises(CheckpointError, match="none of a rehearsal buffer"):
                buffer.load_state_dict({"model": torch.zeros(3)})

    on_ranks(2, rank_main)


def test_a_state_of_one_rank_says_which_shards_it_lacks() -> None:
    """As when rank 0 alone has asked for it, and all load what it wrote."""

    def saving(end: Transport) -> dict[str, Any] | None:
        with make(end) as buffer:
            run_on(buffer, end.rank, range(3))
            return buffer.state_dict() if end.rank == 0 else None

    state = on_ranks(3, saving)[0]

    def loading(end: Transport) -> str:
        with make(end) as buffer:
            with pytest.raises(CheckpointError) as error:
                buffer.load_state_dict(state)
            assert len(buffer) == 0
            return str(error.value)

    first, *others = on_ranks(3, loading)
    assert first == "rank 0: load_state_dict failed on rank(s) [1, 2]: see the error there"
    for rank, message in enumerate(others, start=1):
        assert message.startswith(
            f"rank {rank}: the state holds only the rank(s) [0] of 3, and rank {rank} is needed: "
            "state_dict() gives a rank's own shard. Let all ranks call state_dict(whole=True)"
        )


def test_many_saves_and_loads_do_not_drift(tmp_path: Path) -> None:
    """From ranks to ranks and on: what a class has offered stays what it was, or little more."""
    saved_after(tmp_path / "0", 4, 60)
    rank_counts = [4, 3, 7, 2, 5, 1, 4]
    for number, (_, num_ranks) in enumerate(pairwise(rank_counts)):

        def rank_main(end: Transport, number: int = number) -> None:
            with make(end) as buffer:
                buffer.load(tmp_path / str(number))
                buffer.save(tmp_path / str(number + 1))

        on_ranks(num_ranks, rank_main)
    offered = []
    for number in (0, len(rank_counts) - 1):

        def read(end: Transport, number: int = number) -> Any:
            with make(end) as buffer:
                buffer.load(tmp_path / str(number))
                return buffer.state_dict()[f"rank_{end.rank}"][1]["policy.offered"]

        offered.append(sum(int(each.sum()) for each in on_ranks(4, read)))
    assert offered[0] <= offered[1] <= 1.5 * offered[0]


def test_the_whole_state_for_frameworks() -> None:
    with RehearsalBuffer(8, num_representatives=2) as buffer:
        buffer.update((torch.arange(4.0), torch.arange(4)))
        state = buffer.whole.state_dict()
        with RehearsalBuffer(8, num_representatives=2) as other:
            other.whole.load_state_dict(state)
            assert len(other) == len(buffer) == 4
