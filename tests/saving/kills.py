"""Kills ranks at random moments: of start, step, save, load and close.

The others end with an error that says what happened, in time; and the folder holds a whole save, not
older than the last one that had ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import time
from collections import Counter
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from saved_streams import batch_of, held

from ritornello import CheckpointError, PeerLostError, RehearsalBuffer, SavedFolder
from ritornello.transports import LocalTransport

Dice = np.random.Generator

TIMEOUT_SECONDS = 15.0

MOST_SECONDS = 2 * TIMEOUT_SECONDS + 30.0
"""Within which a survivor must have ended, on a machine that does much else."""

LONGEST_LIFE_SECONDS = 1.0
"""Of a job, from when all its ranks are there."""

STAGES = ("start", "load", "step", "save", "close")


class Stage:
    """Says in a file what a rank is doing."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)

    def enter(self, name: str) -> None:
        os.pwrite(self._file, bytes([STAGES.index(name)]), 0)


def make(num_ranks: int, **arguments: Any) -> RehearsalBuffer:
    return RehearsalBuffer(60, num_representatives=4, num_candidates=4, seed=3, **arguments)


def run_until_killed(rank: int, num_ranks: int, folder: Path, job: Path, transport: str) -> None:
    """One rank: makes a buffer, loads, goes on, saves and closes, again and again."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    dice = np.random.default_rng(int(job.name))  # the same on all ranks
    stage = Stage(job / f"stage-{rank}")
    stacks = os.open(job / f"stacks-{rank}", os.O_WRONLY | os.O_CREAT)
    faulthandler.dump_traceback_later(MOST_SECONDS, file=stacks)
    (job / f"ready-{rank}").touch()
    has_saved = (folder / "manifest.json").exists()  # of a job before: this one has not begun
    try:
        while True:
            stage.enter("start")
            with make(num_ranks, transport=transport, timeout_seconds=TIMEOUT_SECONDS) as buffer:
                if has_saved:
                    stage.enter("load")
                    buffer.load(folder)
                stage.enter("step")
                step = buffer.stats().num_rounds
                for _ in range(int(dice.integers(1, 8))):
                    buffer.update(batch_of(step, rank))
                    step += 1
                stage.enter("save")
                buffer.save(folder, background=bool(dice.random() < 0.5))
                stage.enter("step")
                for _ in range(int(dice.integers(0, 4))):
                    buffer.update(batch_of(step, rank))
                    step += 1
                stage.enter("save")
                buffer.wait_until_saved()
                has_saved = True
                if rank == 0:
                    (job / "saved").write_text(str(SavedFolder(folder).manifest.num_rounds))
                stage.enter("close")
    except BaseException as error:
        told = {"kind": type(error).__name__, "message": str(error), "at": time.time()}
        (job / f"error-{rank}").write_text(json.dumps(told))
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def kill_again_and_again(folder: Path, num_kills: int, seed: int = 0) -> Counter[str]:
    """Kills jobs; raises AssertionError at the first that left something else than it should.

    Returns:
        How many kills came in which stage, by its name and whom they met.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch.distributed", "ritornello"])
    dice, moments = np.random.default_rng(seed), Counter[str]()
    save = folder / "save"
    num_saved = 0
    for number in range(num_kills):
        job = folder / f"{seed}{number:06}"
        job.mkdir()
        num_ranks = int(dice.integers(1, 4))
        transport = str(dice.choice(["auto", "collective"])) if num_ranks > 1 else "auto"
        ranks = [
            processes.Process(target=run_until_killed, args=(rank, num_ranks, save, job, transport))
            for rank in range(num_ranks)
        ]
        for each in ranks:
            each.start()
        try:
            moments[_kill_one(ranks, job, dice)] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, kill {number}, {num_ranks} ranks, {transport}")
            raise
        finally:
            for each in ranks:
                each.kill()
                each.join()
                each.close()
        if (job / "saved").exists():
            num_saved = int((job / "saved").read_text() or 0)
        num_saved = _check_folder(save, num_saved)
        _check_memory()
    return moments


def _kill_one(ranks: list[BaseProcess], job: Path, dice: Dice) -> str:
    """Kills a rank or all, and waits for the others."""
    deadline = time.monotonic() + 100.0
    while not all((job / f"ready-{rank}").exists() for rank in range(len(ranks))):
        assert time.monotonic() < deadline, "the job does not begin"
        time.sleep(0.005)
    time.sleep(dice.random() * LONGEST_LIFE_SECONDS)
    victim = int(dice.integers(len(ranks)))
    victims = ranks if dice.random() < 0.2 else [ranks[victim]]
    stage = STAGES[((job / f"stage-{victim}").read_bytes() or b"\0")[0]]
    killed_at = time.time()
    for each in victims:
        each.kill()
    survivors = [rank for rank, each in enumerate(ranks) if each not in victims]
    deadline = time.monotonic() + MOST_SECONDS
    for rank in survivors:
        ranks[rank].join(max(0.0, deadline - time.monotonic()))
        if ranks[rank].is_alive():
            time.sleep(2 * LONGEST_LIFE_SECONDS)
            stacks = (job / f"stacks-{rank}").read_text()
            raise AssertionError(f"rank {rank} hangs, {victim} was killed in {stage}: {stacks}")
        told = json.loads((job / f"error-{rank}").read_text())
        where = f"rank {victim} was killed in {stage}; rank {rank} after "
        where += f"{told['at'] - killed_at:.1f} s: {told['kind']}: {told['message']}"
        assert told["kind"] in (PeerLostError.__name__, CheckpointError.__name__), where
        assert "rank" in told["message"] or "peer" in told["message"], where
        assert told["at"] - killed_at < MOST_SECONDS, where
    whom = "all" if len(victims) == len(ranks) else f"one of {len(ranks)}"
    return f"{stage}, {whom}"


def _check_memory() -> None:
    """Nothing with a name is left in shared memory; what others have there is gone soon."""
    deadline = time.monotonic() + 20.0
    while left := [name for name in os.listdir("/dev/shm") if "ritornello" in name]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _check_folder(save: Path, num_saved: int) -> int:
    """Loads what a job has left; the round of it."""
    if not num_saved and not (save / "manifest.json").exists():
        return 0
    with make(1, transport=LocalTransport()) as buffer:
        buffer.load(save)
        num_rounds = SavedFolder(save).manifest.num_rounds
        assert num_rounds >= num_saved
        numbers = held(buffer)
        assert len(set(numbers)) == len(numbers) == len(buffer) > 0
        for number, label in numbers:
            images, labels = batch_of(number // 64**2, number // 64 % 64)
            assert label == int(labels[images.tolist().index(number)])
        buffer.update(batch_of(num_rounds, 0))
    return num_rounds
