"""Variants of saved buffers, each damaged in some way and loaded into some buffer."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accidents import ACCIDENTS
from hostile_saves import HOSTILE, VALUES, change_arrays, changed, places_in, with_value
from rich.console import Console
from saved_buffers import (
    SETTINGS,
    TARGETS,
    Target,
    another_save,
    check_load,
    saved_once,
    states_of,
)

from ritornello import CheckpointError, SavedFolder, forget
from ritornello.experiments.inspection.inspection import inspect_buffer
from ritornello.experiments.inspection.tables import tables_of
from ritornello.records.digest import digest
from ritornello.saving.manifest import with_checksum
from ritornello.saving.shard_file import ROWS

Dice = np.random.Generator


KINDS = {
    **{f"accident: {k}": d for k, d in ACCIDENTS.items()},
    **{f"hostile: {k}": d for k, d in HOSTILE.items()},
}


def check_variant(kind: str, number: int, scratch: Path, seed: int = 0) -> str:
    """Makes a damaged copy of some saved buffer, and loads it into some other one.

    Returns:
        See ``check_load``.
    """
    dice = np.random.default_rng([seed, digest(kind), number])
    name = str(dice.choice(list(SETTINGS)))
    target = some_target(name, dice)
    original = saved_once(name, scratch)
    folder = scratch / f"{name}@{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    try:
        KINDS[kind](folder, dice)
        outcome = check_load(name, target, folder, scratch)
        check_reading(folder)
        return outcome
    except BaseException as error:
        error.add_note(f"{kind}, number {number}: {name!r} into {target}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for moved in scratch.glob(f"{name}@{number}.*"):
            moved.unlink()


def check_reading(folder: Path) -> None:
    """Reads a folder without ranks, in all ways: what cannot be read ends in a plain error."""

    def read() -> None:
        saved = SavedFolder(folder)
        for rank in range(len(saved.manifest.files)):
            for _ in saved.representatives(rank):
                pass

    def inspect(check: bool) -> None:
        console = Console(file=io.StringIO())
        for part in tables_of(inspect_buffer(folder, check)):
            console.print(part)

    def forget_a_class(dry_run: bool) -> None:
        try:
            forget(folder, {"label": 1}, dry_run=dry_run)
        except ValueError as error:
            if not str(error).startswith("where label"):
                raise

    with suppress(CheckpointError):
        read()
    for each in (True, False):
        with suppress(CheckpointError):
            inspect(each)
        with suppress(CheckpointError):
            forget_a_class(each)


def some_target(name: str, dice: Dice) -> Target:
    target = TARGETS[str(dice.choice(list(TARGETS)))]
    return TARGETS["begun"] if name == "without labels" and target.arguments else target


def prepare(scratch: Path) -> None:
    """Makes what the variants are made of."""
    for name in SETTINGS:
        saved_once(name, scratch)
        another_save(name, scratch)


def damaged_state(state: Any, dice: Dice) -> Any:
    """A state with something wrong in it."""
    odd: list[Any] = [
        None,
        1,
        "x",
        [],
        {},
        (),
        (1, 2),
        ("{}", {}),
        b"x",
        torch.zeros(3),
        ("x", None),
    ]
    strange_keys: list[Any] = ["rank_7", "rank_²", "x", "rank_-1", "rank_", 5, None]
    kind = int(dice.integers(9))
    key = str(dice.choice(list(state)))
    other = odd[dice.integers(len(odd))]
    if kind == 0:
        return other
    if kind == 1:
        return {name: each for name, each in state.items() if name != key}
    if kind == 2:
        return {**state, key: other}
    if kind == 3:
        return {**state, strange_keys[dice.integers(len(strange_keys))]: other}
    text, tensors = state[key]
    if kind == 4:
        content = json.loads(text)
        places = list(places_in(content))
        value = VALUES[dice.integers(len(VALUES))]
        content = with_value(content, places[dice.integers(len(places))], value)
        return {**state, key: (json.dumps(with_checksum(content)), tensors)}
    name = str(dice.choice(list(tensors)))
    if kind == 5:
        strange = [
            other,
            tensors[name].to(torch.float32),
            tensors[name].to_sparse(),
            tensors[name].to("meta"),
            torch.zeros(2, 2),
            tensors[name].to(torch.float64).requires_grad_(),
        ]
        return {**state, key: (text, {**tensors, name: strange[dice.integers(len(strange))]})}
    if kind == 6:
        return {**state, key: [text, {**tensors, 5: torch.zeros(3, dtype=torch.int64)}]}
    arrays = {each: value.numpy().copy() for each, value in tensors.items()}
    if kind == 7:
        change_arrays(arrays, dice)
    else:
        arrays[ROWS] = changed(arrays[ROWS], dice)
    return {**state, key: (text, {each: torch.from_numpy(a) for each, a in arrays.items()})}


def check_state_variant(number: int, scratch: Path, seed: int = 0) -> str:
    """The same for a damaged ``state_dict``, of all ranks or of each rank its own."""
    dice = np.random.default_rng([seed, 1, number])
    name = str(dice.choice(list(SETTINGS)))
    target = some_target(name, dice)
    whole = states_of(name, scratch)[0]
    num_ranks = max(SETTINGS[name].num_ranks, target.num_ranks or 0)
    damaged = damaged_state(whole, dice)
    states = [damaged] * num_ranks
    if dice.random() < 0.3 and isinstance(damaged, dict):
        keys = [f"rank_{rank}" for rank in range(num_ranks)]
        states = [{key: damaged[key]} if key in damaged else whole for key in keys]
    if dice.random() < 0.2:
        states[dice.integers(num_ranks)] = whole
    try:
        return check_load(name, target, states, scratch)
    except BaseException as error:
        error.add_note(f"state number {number}: {name!r} into {target}")
        raise
