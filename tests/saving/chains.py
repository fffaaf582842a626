"""Random chains of update, save, load, reshard, forget and convert, and what must come of each.

What was held before is what is held after, as docs/saving.md says:

- on as many ranks and with the same capacity slot for slot, and what follows bit for bit;
- on others all of it, in shards of one size up to one; or as many as a smaller capacity takes;
- without what was forgotten; with what was converted as it was else;
- every sample with the label, the values and the round with which it was offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ritornello import ClassBalanced, PerClassRandom, RehearsalBuffer, SavedFolder, forget
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport

Dice = np.random.Generator

BATCH_SIZE, MOST_RANKS = 6, 8

# Samples: all of each follows from its number, and that says when and where it was offered.


def numbers_of_batch(round_number: int, rank: int) -> Tensor:
    return (round_number * MOST_RANKS + rank) * BATCH_SIZE + torch.arange(BATCH_SIZE)


def round_of(numbers: Tensor) -> Tensor:
    return numbers // (MOST_RANKS * BATCH_SIZE)


def labels_of(numbers: Tensor) -> Tensor:
    """More classes as rounds go by."""
    return (numbers * 7919 // 13) % (2 + round_of(numbers) // 5)


def extra_of(numbers: Tensor) -> Tensor:
    return (numbers % 5).to(torch.float16)[:, None] / torch.arange(1, 4)


@dataclass(frozen=True)
class Kind:
    """How samples are nested."""

    label: Any
    make: Callable[[Tensor, Tensor], list[tuple[Any, Tensor]]]
    number: Any
    container: Callable[[list[tuple[Any, Tensor]]], Any]

    def batch(self, numbers: Tensor, is_converted: bool) -> Any:
        parts = self.make(numbers, labels_of(numbers))
        if is_converted:
            parts = [*parts, ("extra", extra_of(numbers))]
        return self.container(parts)

    def numbers(self, batch: Any) -> Tensor:
        found: Tensor = batch[self.number]
        return found


KINDS = {
    "tuple": Kind(1, lambda n, y: [(0, n), (1, y)], 0, lambda parts: tuple(p for _, p in parts)),
    "dict": Kind(
        "y",
        lambda n, y: [("x", (n % 251).to(torch.uint8)), ("y", y.to(torch.uint8)), ("id", n)],
        "id",
        dict,
    ),
    "nested": Kind(
        (0, "class"),
        lambda n, y: [
            (0, {"class": y.to(torch.int16), "none": torch.zeros(len(n), 0)}),
            (1, torch.stack([n, -n], dim=1).to(torch.float64)),
            (2, n),
        ],
        2,
        lambda parts: [p for _, p in parts],
    ),
}

SELECTIONS: dict[str, Callable[[], Any]] = {
    "class-balanced": lambda: "class-balanced",
    "fixed shares": lambda: ClassBalanced(40, shares="fixed"),
    "per-class-random": PerClassRandom,
    "greedy-balanced": lambda: "greedy-balanced",
    "first-offered": lambda: "first-offered",
    "reservoir": lambda: "reservoir",
    "fifo": lambda: "fifo",
    "class-balanced-reservoir": lambda: "class-balanced-reservoir",
    "grasp": lambda: "grasp",
}

SAMPLINGS = ("uniform", "uniform", "class-balanced", "grasp", "earlier-tasks")


@dataclass(frozen=True)
class Setting:
    """A buffer: what may differ from one link of a chain to the next."""

    num_ranks: int
    capacity: int
    arguments: dict[str, Any]

    @classmethod
    def random(cls, dice: Dice) -> Setting:
        capacity = int(dice.integers(8, 60))
        arguments: dict[str, Any] = {
            "num_representatives": float(dice.choice([0, 0.5, 1, 3, 5])),
            "num_candidates": [None, 3][dice.integers(2)],
            "sampling": str(dice.choice(SAMPLINGS)),
            "num_draws": int(dice.choice([1, 1, 2])),
            "seed": int(dice.integers(100)),
            "asynchronous": bool(dice.random() < 0.5),
        }
        if dice.random() < 0.2:
            arguments["most_representatives"] = 6
        return cls(int(dice.integers(1, 5)), capacity, arguments)


@dataclass
class Saved:
    """What must come of loading."""

    setting: Setting
    source: Path | dict[str, Any]
    held: list[list[int]]
    """The numbers in each shard, slot for slot."""
    num_rounds: int
    tasks: tuple[str, ...]
    is_converted: bool
    later: list[list[Any]] | None
    """What each rank got in its next steps; None: something else was drawn anew."""
    history: list[str] = field(default_factory=list)

    @property
    def everything(self) -> list[int]:
        return sorted(number for shard in self.held for number in shard)


class Chain:
    """One chain.

    Args:
        seed: of it.
        folder: where it saves.
    """

    def __init__(self, seed: tuple[int, int], folder: Path) -> None:
        self._dice = np.random.default_rng(seed)
        self._folder = folder
        self._selection = str(self._dice.choice(list(SELECTIONS)))
        self._kind = KINDS[str(self._dice.choice(list(KINDS)))]
        self.history = [f"{self._selection}, label={self._kind.label}"]

    def play(self, num_links: int) -> None:
        """Raises AssertionError, or whatever came instead of what should."""
        saved: list[Saved] = []
        for number in range(num_links):
            before = saved[self._dice.integers(len(saved))] if saved else None
            saved.append(self._link(number, before))
            # A state says nothing of its folder, so it is left as it is.
            if isinstance(saved[-1].source, Path) and self._dice.random() < 0.3:
                saved[-1] = self._forget(saved[-1])

    def _link(self, number: int, before: Saved | None) -> Saved:
        """Loads one save into a new buffer, goes on, and saves."""
        dice, kind = self._dice, self._kind
        setting = Setting.random(dice)
        if before is not None and dice.random() < 0.4:
            setting = before.setting
            if dice.random() < 0.2:  # on as many ranks, with the same capacity
                setting = replace(setting, arguments=Setting.random(dice).arguments)
        convert = (
            before is not None
            and isinstance(before.source, Path)  # states are not converted
            and not before.is_converted
            and dice.random() < 0.2
        )
        is_converted = convert or (before is not None and before.is_converted)
        num_steps, num_between = int(dice.integers(0, 14)), int(dice.integers(0, 4))
        how = str(dice.choice(["save", "background", "state_dict"]))
        begins_task, measures = dice.random() < 0.3, dice.random() < 0.5
        needs_task = setting.arguments["sampling"] == "earlier-tasks"
        rate = int(dice.integers(7)) if "most_representatives" in setting.arguments else None
        folder = self._folder / str(number)
        self.history.append(
            f"{number}: {setting}, {'new' if before is None else before.history[-1]}, "
            f"convert={convert}, {num_steps} steps, {how}"
        )

        def steps(buffer: RehearsalBuffer, rank: int, num: int) -> list[Any]:
            found = []
            for _ in range(num):
                numbers = numbers_of_batch(buffer.stats(per_class=False).num_rounds, rank)
                found.append(buffer.update(kind.batch(numbers, is_converted)))
                check_samples(kind, found[-1], is_converted)
            return found

        def rank_main(end: Transport) -> dict[str, Any]:
            told: dict[str, Any] = {}
            with RehearsalBuffer(
                setting.capacity,
                selection=SELECTIONS[self._selection](),
                label=kind.label,
                transport=end,
                **setting.arguments,
            ) as buffer:
                if before is not None:
                    load(buffer, before, kind if convert else None)
                    told["loaded"] = held(buffer, kind, is_converted)
                    assert buffer.tasks == before.tasks
                    if goes_on_exactly(before, setting, convert):
                        later = steps(buffer, end.rank, len(before.later[end.rank]))
                        assert_equal(later, before.later[end.rank])
                        load(buffer, before, None)  # back again
                        assert held(buffer, kind, is_converted) == told["loaded"]
                if begins_task or (needs_task and not buffer.tasks):
                    buffer.begin_task(f"task {number}")
                if rate is not None:
                    buffer.num_representatives = rate
                steps(buffer, end.rank, num_steps)
                if measures and setting.arguments["sampling"] == "grasp":
                    buffer.measure_distances(lambda batch: features(kind.numbers(batch)))
                told["held"] = held(buffer, kind, is_converted)
                told["num_rounds"] = buffer.stats().num_rounds
                told["tasks"], told["len"] = buffer.tasks, len(buffer)
                if how == "state_dict":
                    told["state"] = buffer.state_dict(whole=True)
                else:
                    buffer.save(folder, background=how == "background")
                told["later"] = steps(buffer, end.rank, num_between)
                if how == "background" and num_between % 2:
                    buffer.wait_until_saved()
            return told

        ranks = run_ranks(LocalTransport.connect(setting.num_ranks, 60.0), rank_main)
        shards = [told["held"] for told in ranks]
        assert all(told["len"] == sum(map(len, shards)) for told in ranks)
        if before is not None:
            self._check_loaded(before, setting, convert, [told["loaded"] for told in ranks])
        saved = Saved(
            setting,
            ranks[0]["state"] if how == "state_dict" else folder,
            shards,
            ranks[0]["num_rounds"],
            ranks[0]["tasks"],
            is_converted,
            [told["later"] for told in ranks],
            [f"of {number}"],
        )
        if how != "state_dict":
            check_folder(saved, kind)
        return saved

    def _check_loaded(
        self, before: Saved, setting: Setting, convert: bool, loaded: list[list[int]]
    ) -> None:
        same = (before.setting.num_ranks, before.setting.capacity) == (
            setting.num_ranks,
            setting.capacity,
        )
        everything = sorted(number for shard in loaded for number in shard)
        assert len(set(everything)) == len(everything)
        if same:
            assert loaded == before.held
            return
        sizes = [len(shard) for shard in loaded]
        assert max(sizes) - min(sizes) <= 1
        if setting.capacity >= len(before.everything) and self._selection != "fixed shares":
            assert everything == before.everything
        else:
            assert set(everything) <= set(before.everything)
            if self._selection != "fixed shares":
                assert len(everything) == setting.capacity
        if self._selection == "fixed shares" and setting.capacity >= before.setting.capacity:
            assert everything == before.everything

    def _forget(self, saved: Saved) -> Saved:
        """Without a class, or some samples."""
        assert isinstance(saved.source, Path)
        everything = torch.tensor(saved.everything, dtype=torch.int64)
        meant = set[int]()
        where: dict[str, Any]
        if self._dice.random() < 0.5:
            label = int(self._dice.integers(4))
            where = {"label": label}
            meant = set(everything[labels_of(everything) == label].tolist())
        else:
            chosen = self._dice.choice(saved.everything or [0], size=3).tolist()
            where = {str(self._kind.number): chosen}
            meant = set(chosen) & set(saved.everything)
        self.history.append(f"   forget {where}")
        dry = forget(saved.source, where, dry_run=True)
        forgotten = forget(saved.source, where, selection=self._forgetting())
        assert (dry.num_removed, dry.num_left) == (forgotten.num_removed, forgotten.num_left)
        assert forgotten.num_removed == len(meant)
        if not meant:
            return saved
        shards = [[each for each in shard if each not in meant] for shard in saved.held]
        found = check_folder(replace(saved, held=shards), self._kind, in_order=False)
        return replace(saved, held=found, later=None, history=[*saved.history, "forgotten"])

    def _forgetting(self) -> Any:
        policy = SELECTIONS[self._selection]()
        return None if isinstance(policy, str) else policy


def load(buffer: RehearsalBuffer, saved: Saved, convert: Kind | None) -> None:
    if isinstance(saved.source, dict):
        buffer.load_state_dict(saved.source)
        return

    def converted(batch: Any) -> Any:
        assert convert is not None
        return convert.batch(convert.numbers(batch), True)

    buffer.load(saved.source, convert=None if convert is None else converted)


def goes_on_exactly(saved: Saved, setting: Setting, convert: bool) -> bool:
    has_begun = saved.num_rounds > 0  # else a buffer that has cannot become it again
    return saved.later is not None and setting == saved.setting and not convert and has_begun


def held(buffer: RehearsalBuffer, kind: Kind, is_converted: bool) -> list[int]:
    """This rank's numbers, slot for slot."""
    found = []
    for batch in buffer.representatives(7):
        check_samples(kind, batch, is_converted)
        found += kind.numbers(batch).tolist()
    return found


def check_samples(kind: Kind, batch: Any, is_converted: bool) -> None:
    """Each is as it was offered."""
    assert_equal(batch, kind.batch(kind.numbers(batch), is_converted))


def check_folder(saved: Saved, kind: Kind, in_order: bool = True) -> list[list[int]]:
    """What lies on disk: samples, when they came, and what the policy knows of them.

    Returns:
        The numbers in each shard, slot for slot.
    """
    assert isinstance(saved.source, Path)
    folder = SavedFolder(saved.source)
    manifest = folder.manifest
    assert manifest.num_rounds == saved.num_rounds
    assert tuple(task.name for task in manifest.tasks) == saved.tasks
    found = []
    for rank, wanted in enumerate(saved.held):
        numbers = [0][:0]
        for part in folder.representatives(rank):
            check_samples(kind, part.batch, saved.is_converted)
            of_part = kind.numbers(part.batch)
            numbers += of_part.tolist()
            assert np.array_equal(part.admitted_in, round_of(of_part).numpy())
            assert part.labels is not None
            assert np.array_equal(part.labels, labels_of(of_part).numpy())
        assert (numbers if in_order else sorted(numbers)) == (
            wanted if in_order else sorted(wanted)
        )
        found.append(numbers)
        with folder.shard(rank) as shard:
            arrays = shard.arrays()
        if "policy.slots" in arrays and "policy.counts" in arrays:
            labels = np.repeat(arrays["policy.labels"], arrays["policy.counts"])
            slots = torch.tensor(numbers, dtype=torch.int64)[arrays["policy.slots"]]
            assert np.array_equal(labels, labels_of(slots).numpy())
    return found


def features(numbers: Tensor) -> Tensor:
    return torch.stack([numbers % 3 + 1, numbers % 5, numbers % 7], dim=1).float()


def assert_equal(one: Any, other: Any) -> None:
    """Nested alike, and the same tensors."""
    if isinstance(other, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        return
    assert len(one) == len(other)
    for key in other if isinstance(other, dict) else range(len(other)):
        assert_equal(one[key], other[key])


def play(seed: int, number: int, folder: Path) -> None:
    """Plays a chain; an error says which, and what came before."""
    chain = Chain((seed, number), folder)
    try:
        chain.play(num_links=5)
    except BaseException as error:
        error.add_note(f"--seed {seed} --first {number} --count 1")
        for each in chain.history:
            error.add_note(each)
        raise
