"""What sampling policies remember is saved with the buffer, and loaded where it still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_streams import assert_same, batch_of, held, make, on_ranks, run_on

from ritornello import CheckpointError, Contents, RehearsalBuffer, SamplingPolicy, forget
from ritornello.arrays import Arrays, Ints
from ritornello.saving.folder import SavedFolder
from ritornello.transports import LocalTransport, Transport


class LeastDrawn(SamplingPolicy):
    """Those that were drawn least often; chance decides between equals."""

    needs_places = True

    def bind(self, capacity: int) -> None:
        self._times = np.zeros(capacity)
        self._num_draws = 0

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        places = np.arange(len(self._times))[contents.used_places]
        order = np.lexsort([generator.random(len(places)), self._times[places]])
        drawn = np.resize(order[: num_ranks * num_drawn], num_ranks * num_drawn)
        self._times[places[drawn]] += 1
        self._num_draws += 1
        return drawn.reshape(num_ranks, num_drawn)

    def overwritten(self, places: Ints) -> None:
        self._times[places] = 0

    def state(self) -> Arrays:
        return {"times": self._times.copy(), "draws": np.array([self._num_draws])}

    def restore(self, state: Arrays) -> None:
        self._times[:] = state["times"]
        (self._num_draws,) = state["draws"].tolist()

    def adopt(self, state: Arrays, before: Ints, after: Ints) -> None:
        if "times" in state:
            self._times[after] = state["times"][before]


POLICY = LeastDrawn()
"""One object for all buffers and ranks: each buffer has a copy of its own."""


def all_times(buffer: RehearsalBuffer) -> np.ndarray:
    """By place, after the last round."""
    len(buffer)
    return np.asarray(buffer._steps.rounds.sampling.state()["times"])


def times_of(buffer: RehearsalBuffer, rank: int) -> dict[int, float]:
    """How often each of a rank's representatives was drawn, by its number."""
    rounds = buffer._steps.rounds
    times = all_times(buffer)[rounds.contents.places_of_slots(rank, np.arange(rounds.num_held))]
    return {number: times[slot] for slot, (number, _) in enumerate(held(buffer))}


def save(folder: Path, num_ranks: int, num_steps: int, **arguments: Any) -> list[dict[int, float]]:
    def rank_main(end: Transport) -> dict[int, float]:
        with make(end, **arguments) as buffer:
            run_on(buffer, end.rank, range(num_steps))
            buffer.save(folder)
            return times_of(buffer, end.rank) if arguments["sampling"] is POLICY else {}

    return on_ranks(num_ranks, rank_main)


def test_a_policy_of_ones_own_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def undisturbed(end: Transport) -> Any:
        with make(end, sampling=POLICY) as buffer:
            return run_on(buffer, end.rank, range(60))

    def loading(end: Transport) -> Any:
        with make(end, sampling=POLICY) as buffer:
            buffer.load(tmp_path)
            return run_on(buffer, end.rank, range(45, 60))

    whole = on_ranks(2, undisturbed)
    save(tmp_path, 2, 45, sampling=POLICY)
    for wanted, found in zip(whole, on_ranks(2, loading), strict=True):
        assert_same(wanted[45:], found)
    assert not vars(POLICY)  # the object itself remembers nothing


def test_what_it_remembers_goes_along_to_other_ranks(tmp_path: Path) -> None:
    before = {
        n: times for each in save(tmp_path, 2, 45, sampling=POLICY) for n, times in each.items()
    }

    def loading(end: Transport) -> dict[int, float]:
        with make(end, sampling=POLICY) as buffer:
            buffer.draw()  # nothing yet
            buffer.offer(batch_of(0, end.rank))  # so that there is something to be replaced
            buffer.load(tmp_path)
            return times_of(buffer, end.rank)

    after = {n: times for each in on_ranks(3, loading) for n, times in each.items()}
    assert after.keys() == before.keys()
    # What comes next is drawn again, after the times of before were taken over.
    assert all(after[n] - before[n] in (0, 1) for n in after)
    assert sum(after.values()) - sum(before.values()) == 3 * 5
    assert len(set(before.values())) > 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nothing_is_remembered_of_another_policy(num_ranks: int, tmp_path: Path) -> None:
    save(tmp_path, 1, 20, sampling="grasp")

    def loading(end: Transport) -> float:
        with make(end, sampling=POLICY) as buffer:
            buffer.load(tmp_path)
            return float(all_times(buffer).sum())

    assert set(on_ranks(num_ranks, loading)) == {5.0 * num_ranks}  # of the draw for the next step


def test_after_removing_samples_a_policy_of_ones_own_begins_anew(tmp_path: Path) -> None:
    save(tmp_path, 2, 45, sampling=POLICY)
    assert forget(tmp_path, {"label": 1}).num_removed
    with SavedFolder(tmp_path).shard(0) as shard:
        names = {name for name in shard.arrays() if name.startswith("contents.")}
    assert names == {"contents.labels", "contents.counts", "contents.places"}

    def loading(end: Transport) -> float:
        with make(end, sampling=POLICY) as buffer:
            buffer.load(tmp_path)
            return float(all_times(buffer).sum())

    assert on_ranks(2, loading) == [10.0, 10.0]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("labels", np.zeros(3)),
        ("times", np.zeros(3, np.float32)),
        ("times", np.zeros((3, 1))),
        ("times", [1, 2]),
    ],
)
def test_a_state_that_cannot_be_saved(name: str, array: Any, tmp_path: Path) -> None:
    class Odd(LeastDrawn):
        def state(self) -> Arrays:
            return {name: array}

    with make(LocalTransport(), sampling=Odd()) as buffer:
        run_on(buffer, 0, range(3))
        with pytest.raises(CheckpointError, match=f"sampling policy has '{name}': it must hold"):
            buffer.save(tmp_path)
        run_on(buffer, 0, range(3, 5))


def test_policies_without_distances_load_what_earlier_releases_saved() -> None:
    """Those kept distances and turns for every policy that looks at labels."""
    with make(LocalTransport(), sampling="class-balanced") as buffer:
        run_on(buffer, 0, range(30))
        state = buffer.state_dict()
        wanted = run_on(buffer, 0, range(30, 40))
    text, tensors = state["rank_0"]
    assert not {"contents.distances", "contents.turns"} & tensors.keys()
    earlier = {"contents.distances": torch.full((97,), torch.nan, dtype=torch.float64)}
    earlier["contents.turns"] = torch.tensor([0])
    with make(LocalTransport(), sampling="class-balanced") as buffer:
        buffer.load_state_dict({"rank_0": (text, {**tensors, **earlier})})
        assert_same(run_on(buffer, 0, range(30, 40)), wanted)


def test_an_array_of_another_kind_is_refused() -> None:
    with make(LocalTransport(), sampling="grasp") as buffer:
        run_on(buffer, 0, range(5))
        text, tensors = buffer.state_dict()["rank_0"]
        for name, kinds in (("places", "int64"), ("distances", "int64 or float64")):
            wrong = {**tensors, f"contents.{name}": torch.zeros(3, dtype=torch.uint8)}
            with pytest.raises(
                CheckpointError, match=rf"contents.{name} is uint8 .*: it must be {kinds} \[n\]"
            ):
                buffer.load_state_dict({"rank_0": (text, wrong)})
