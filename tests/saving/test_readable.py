"""What is saved can be loaded: else it is refused, early, and the save before stays."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_streams import batch_of, held, joined, loaded_on, make, on_ranks, run_on, saved_after

from ritornello import (
    Assignment,
    CheckpointError,
    ClassBalanced,
    ClassBalancedSampling,
    Fifo,
    RehearsalBuffer,
    SavedFolder,
    SelectionPolicy,
    UniformSampling,
    forget,
)
from ritornello.transports import LocalTransport, Transport

# Refused with the mini-batch.


def nested(levels: int, inside: Any = None) -> Any:
    batch: Any = torch.arange(3) if inside is None else inside
    for _ in range(levels):
        batch = [batch]
    return batch


TOO_MUCH: dict[str, tuple[Callable[[], Any], str]] = {
    "nested too deeply": (
        lambda: nested(65),
        "nested more than 64 levels deep: give its tensors in a flatter tuple",
    ),
    "nested without an end": (lambda: nested(5000), "nested more than 64 levels deep"),
    "empty and nested too deeply": (
        lambda: (torch.arange(3), nested(65, [])),
        "nested more than 64 levels deep",
    ),
    "too many tensors": (
        lambda: [torch.arange(3)] * 10_001,
        "holds more than 10000 tensors: stack those that are alike",
    ),
    "a dtype without a size": (
        lambda: torch.zeros(3, 2, dtype=torch.uint8).view(torch.bits8),
        r"batch: a field of the dtype torch.bits8 cannot be stored",
    ),
    "too large": (
        lambda: torch.zeros(1, dtype=torch.int64).expand(3, 2**19, 2**19),
        "batch: a field of the shape",
    ),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_samples_that_could_not_be_loaded_are_refused(what: str) -> None:
    make_batch, message = TOO_MUCH[what]
    with RehearsalBuffer(8, num_representatives=1, selection="fifo", label=None) as buffer:
        with pytest.raises(ValueError, match=message):
            buffer.update(make_batch())
        buffer.update(torch.arange(3))  # it is as new
        assert len(buffer) == 3


def test_what_is_just_not_too_much_is_saved_and_loaded(tmp_path: Path) -> None:
    batches = [nested(64), [torch.arange(3)] * 10_000, {"": {2**70: torch.arange(3)}}]
    for number, batch in enumerate(batches):
        for load in (False, True):
            with RehearsalBuffer(4, num_representatives=1, selection="fifo", label=None) as buffer:
                if load:
                    buffer.load(tmp_path / str(number))
                    assert len(buffer) == 3
                else:
                    buffer.update(batch)
                    buffer.save(tmp_path / str(number))


def test_labels_are_signed_integers(tmp_path: Path) -> None:
    images, largest = torch.zeros(2, 3), 2**63
    with RehearsalBuffer(8, num_representatives=1) as buffer:
        buffer.update((images, torch.tensor([1, largest - 1], dtype=torch.uint64)))
        wrong = torch.tensor([1, largest], dtype=torch.uint64)
        with pytest.raises(
            ValueError, match=f"the label {largest} is out of range.* to {largest}"[:-1]
        ):
            buffer.update((images, wrong))
        buffer.save(tmp_path)
        assert len(buffer) == 2
    with RehearsalBuffer(8, num_representatives=1) as buffer:
        buffer.load(tmp_path)
        assert set(buffer.stats().held_per_class) == {1, largest - 1}


# Refused elsewhere.


def test_names_of_tasks_have_an_end(tmp_path: Path) -> None:
    with make(LocalTransport()) as buffer:
        message = (
            r"begin_task: the name 'x+\.\.\.x+' has 10001 characters: it must have at most 10000"
        )
        with pytest.raises(ValueError, match=message):
            buffer.begin_task("x" * 10_001)
        assert buffer.tasks == ()
        buffer.begin_task("\ud800" * 10_000)
        buffer.save(tmp_path)
    assert len(SavedFolder(tmp_path).manifest.tasks[0].name) == 10_000


def test_a_manifest_that_is_too_long_leaves_the_save_before(tmp_path: Path) -> None:
    wanted = saved_after(tmp_path, 2, 5)
    files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def rank_main(end: Transport) -> str:
        with make(end) as buffer:
            buffer.load(tmp_path)
            for number in range(350):  # each character takes six bytes
                buffer.begin_task(f"{number}" + "é" * 9000)
            with pytest.raises(CheckpointError) as error:
                buffer.save(tmp_path, background=end.rank >= 0)
            for whole in (False, True):
                with pytest.raises(CheckpointError, match="what is saved could not be loaded"):
                    buffer.state_dict(whole=whole)
            run_on(buffer, end.rank, range(5, 7))
            return str(error.value)

    for message in on_ranks(2, rank_main):
        assert "save failed" in message or "what is saved could not be loaded" in message
        assert "the manifest is no manifest: it has 1" in message
        assert "bytes, and 16777216 at most" in message
    assert files == {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert sorted(joined(loaded_on(tmp_path, 1))) == sorted(wanted)


def test_a_proof_that_is_too_long_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    saved_after(tmp_path, 1, 5)
    files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="what is saved could not be loaded: the manifest is"):
        forget(tmp_path, {"0": list(range(300_000))})
    assert files == {each.name: each.read_bytes() for each in tmp_path.iterdir()}


def test_a_clock_before_1970(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: -86400.0)
    with make(LocalTransport()) as buffer:
        buffer.begin_task("first")
        buffer.update(batch_of(0, 0))
        buffer.save(tmp_path)
    assert SavedFolder(tmp_path).manifest.tasks[0].began_at == 0
    assert len(loaded_on(tmp_path, 1)[0]) > 0


# Policies of one's own.


class Everyone(SelectionPolicy):
    """Keeps what comes, from the first slot on; has settings of many kinds."""

    def __init__(self, key: Any = None) -> None:
        self.key, self.names, self.told = key, {"b", "a", "c", "é"}, [object(), len]

    def admit(self, labels: Any, generator: np.random.Generator) -> Assignment:
        slots = np.arange(min(len(labels), self.num_slots))
        return Assignment(slots, slots)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any, size: int) -> None:
        pass


def by_number(label: int) -> int:
    return -label


def test_a_function_among_a_policys_settings_has_no_address(tmp_path: Path) -> None:
    """So that ranks, and jobs, agree on it."""
    for number in range(2):
        with make(LocalTransport(), selection=Everyone(by_number)) as buffer:
            if number:
                buffer.load(tmp_path)
                assert len(buffer) == 3
            else:
                buffer.update((torch.arange(3), torch.arange(3)))
                buffer.save(tmp_path)
    text = SavedFolder(tmp_path).manifest.arguments["selection"]
    assert text == (
        "Everyone(key=<function by_number>, names=['a', 'b', 'c', 'é'], "
        "told=[<object object>, <built-in function len>])"
    )
    with (
        make(LocalTransport(), selection=Everyone(held)) as buffer,
        pytest.raises(CheckpointError, match="has selection=.*by_number.*this one .*held"),
    ):
        buffer.load(tmp_path)


STATES: dict[str, tuple[Any, str]] = {
    "floats": ({"x": np.zeros(3)}, "has 'x': it must hold arrays, int64"),
    "lists": ({"x": [1, 2]}, "has 'x': it must hold arrays, int64"),
    "rows": ({"x": np.zeros((2, 2), np.int64)}, "has 'x': it must hold arrays, int64"),
    "a number": ({5: np.zeros(2, np.int64).sum()}, "has 5: it must hold arrays, int64"),
    "nothing": (None, "no attribute 'items'"),
    "very many": (
        {f"{n:01000}": np.zeros(0, np.int64) for n in range(1100)},
        r"it has \d+ bytes, its header \d+",
    ),
    "not understood": ({"x": np.zeros(1, np.int64)}, "none of mine"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_policys_state_that_could_not_be_loaded(kind: str, tmp_path: Path) -> None:
    state, message = STATES[kind]

    class Own(Everyone):
        wrong = False

        def state(self) -> Any:
            return state if self.wrong else {}

        def restore(self, state: Any, size: int) -> None:
            if state:
                raise ValueError("none of mine")

    policy = Own()
    with make(LocalTransport(), selection=policy) as buffer:
        buffer.update((torch.arange(3), torch.arange(3)))
        buffer.save(tmp_path)
        files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
        Own.wrong = True
        for save in (
            lambda: buffer.save(tmp_path),
            lambda: buffer.save(tmp_path, background=True),
            buffer.state_dict,
        ):
            with pytest.raises(CheckpointError, match=message):
                save()
        assert files == {each.name: each.read_bytes() for each in tmp_path.iterdir()}
        buffer.update((torch.arange(3), torch.arange(3)))


def test_a_policy_that_cannot_be_restored_is_not_saved(tmp_path: Path) -> None:
    class HalfSaved(Everyone):
        restore = SelectionPolicy.restore

    with (
        make(LocalTransport(), selection=HalfSaved()) as buffer,
        pytest.raises(CheckpointError, match=r"HalfSaved cannot be saved .* method restore\(\)"),
    ):
        buffer.update((torch.arange(3), torch.arange(3)))
        buffer.save(tmp_path)


def test_a_policys_state_is_saved_as_it_was(tmp_path: Path) -> None:
    """Also if it gives its own arrays, which go on changing while a save is written."""

    class Counting(Everyone):
        def __init__(self) -> None:
            self._seen = np.zeros(1, np.int64)

        def admit(self, labels: Any, generator: np.random.Generator) -> Assignment:
            self._seen += len(labels)
            return super().admit(labels, generator)

        def state(self) -> Any:
            return {"seen": self._seen}

    with make(LocalTransport(), selection=Counting(), num_candidates=None) as buffer:
        buffer.update((torch.arange(3), torch.arange(3)))
        len(buffer)
        buffer._checkpointing._worker.while_idle = lambda work: True  # type: ignore[method-assign]
        buffer.save(tmp_path, background=True)
        buffer.update((torch.arange(3), torch.arange(3)))
        buffer.wait_until_saved()
    with SavedFolder(tmp_path).shard(0) as shard:
        assert shard.arrays()["policy.seen"].tolist() == [3]


# The same by another name.


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ({"selection": "class-balanced"}, {"selection": ClassBalanced}),
        ({"selection": Fifo}, {"selection": "fifo"}),
        ({"sampling": "class-balanced"}, {"sampling": ClassBalancedSampling()}),
        ({"sampling": UniformSampling()}, {"sampling": "uniform"}),
        ({"label": 1}, {"label": (1,)}),
        ({"label": [1]}, {"label": np.int64(1)}),
        ({"num_draws": np.int32(2)}, {"num_draws": 2}),
    ],
    ids=["selection", "other selection", "sampling", "other sampling", "label", "list", "number"],
)
def test_what_means_the_same_is_the_same(
    saved: dict[str, Any], loading: dict[str, Any], tmp_path: Path
) -> None:
    """Also of two ranks, and for what was drawn for the next step."""
    arguments = (saved, loading)

    def saving(end: Transport) -> Any:
        with make(end, **arguments[end.rank]) as buffer:
            run_on(buffer, end.rank, range(12))
            buffer.save(tmp_path)
            return buffer.update(batch_of(12, end.rank))[0].tolist()

    def going_on(end: Transport) -> Any:
        with make(end, **arguments[1 - end.rank]) as buffer:
            buffer.load(tmp_path)
            return buffer.update(batch_of(12, end.rank))[0].tolist()

    assert on_ranks(2, saving) == on_ranks(2, going_on)


def test_saves_that_name_a_policy_without_settings_otherwise_are_loaded(tmp_path: Path) -> None:
    """As earlier releases did, if they were given an object, or a label in brackets."""
    from hostile_saves import read_manifest, write_manifest

    wanted = saved_after(tmp_path, 1, 5)
    content = read_manifest(tmp_path)
    assert content["arguments"]["selection"] == "class-balanced"
    earlier = {
        "selection": "ClassBalanced(num_classes=None, shares='adaptive')",
        "sampling": "UniformSampling()",
        "label": "(1,)",
    }
    content["arguments"] |= earlier
    write_manifest(tmp_path, content)
    assert loaded_on(tmp_path, 1) == [wanted]
    content["arguments"]["selection"] = "ClassBalanced(num_classes=5, shares='adaptive')"
    write_manifest(tmp_path, content)
    with pytest.raises(CheckpointError, match=re.escape("selection=ClassBalanced(num_classes=5")):
        loaded_on(tmp_path, 1)
