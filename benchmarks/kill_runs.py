"""Kills a run at many moments, has it go on, and compares its end with that of one left alone.

    python benchmarks/kill_runs.py --kills 20
    python benchmarks/kill_runs.py --cost

A kill is SIGKILL to one rank or to the whole job, while it starts, trains or writes a checkpoint.
Ends with status 1 unless the weights are the same bit by bit and no checkpoint was ever damaged.
With ``--cost``: what a step costs more while checkpoints are on and none is due.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.training import run as train
from ritornello.experiments.training.saver import CheckpointSettings

RITORNELLO = (sys.executable, "-m", "ritornello.experiments.cli")


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    """What a user would type."""
    return [
        *RITORNELLO, "run", "digits", "--ranks", str(options.ranks), "--epochs",
        str(options.epochs), "--strategy", options.strategy, "--output", str(folder),
        "--save-every", str(options.save_every), "--resume",
    ]  # fmt: skip


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """The processes of a job's ranks."""
    try:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        return [c for c in map(int, children) if b"spawn_main" in _command_line(c)]
    except OSError:
        return []


def _command_line(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def wait_for_moment(job: subprocess.Popen[str], folder: Path, dice: random.Random) -> str:
    """Waits while the ranks start, for some steps, or for a checkpoint that is being written."""
    moment = dice.choice(("starting", "training", "saving", "saving"))
    began, newest_before = time.monotonic(), newest(folder)
    if moment == "starting":
        seconds = dice.uniform(1, 15)
        while job.poll() is None and time.monotonic() < began + seconds:
            time.sleep(0.05)
        return moment if newest(folder) == newest_before else "training"
    while job.poll() is None and newest(folder) == newest_before:
        time.sleep(0.05)
    if moment == "training":
        time.sleep(dice.uniform(0, 2))
    while moment == "saving" and job.poll() is None:
        if list(folder.glob("checkpoints/*.partial")):
            time.sleep(dice.uniform(0, 0.02))
            break
    return moment


def kill(job: subprocess.Popen[str], dice: random.Random) -> str:
    """Kills a rank or all of the job; says which."""
    ranks = ranks_of(job)
    victims, name = [job.pid, *ranks], "the whole job"
    if ranks and dice.random() < 0.5:
        victims, name = [dice.choice(ranks)], "one rank"
    for process in victims:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            name = "too late"
    return name


def newest(folder: Path) -> str:
    """Its name."""
    whole = sorted(each.name for each in folder.glob("checkpoints/step-????????"))
    return whole[-1] if whole else "none yet"


def torment(options: argparse.Namespace, folder: Path) -> bool:
    """Kills and goes on; whether all ended well."""
    dice = random.Random(options.seed)
    began = time.monotonic()
    subprocess.run(command(options, folder / "alone"), check=True, capture_output=True, text=True)
    expected = json.loads((folder / "alone" / "results.json").read_text())
    print(f"undisturbed: {time.monotonic() - began:.0f} s, {expected['weights_sha256'][:16]}")
    print(f"\n{'kill':>4}  {'whom':<14}{'when':<10}newest checkpoint")
    num_kills = num_runs = 0
    ended_well = True
    while num_kills < options.kills:
        num_runs += 1
        run = folder / f"killed-{num_runs}"
        while not (run / "results.json").exists():
            with subprocess.Popen(
                command(options, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as job:
                if num_kills < options.kills:
                    moment = wait_for_moment(job, run, dice)
                    if job.poll() is None:
                        victim = kill(job, dice)
                        num_kills += victim != "too late"
                        print(f"{num_kills:>4}  {victim:<14}{moment:<10}{newest(run)}", flush=True)
                _, error = job.communicate()
            if "damaged" in error or (job.returncode == 2):
                print(error)
                ended_well = False
        results = json.loads((run / "results.json").read_text())
        same = all(results[name] == expected[name] for name in ("weights_sha256", "top1"))
        verdict = "the same" if same else "ANOTHER END"
        digest = results["weights_sha256"][:16]
        print(f"run {num_runs}: resumed {results['resumed']} times, {digest}: {verdict}")
        ended_well = ended_well and same
    return ended_well


def measure_cost(epochs: int, folder: str, num_pairs: int = 5) -> list[tuple[float, float]]:
    """On each rank: seconds per step without checkpoints, and with them but none due."""
    recipe = recipe_named("digits", num_tasks=1, epochs=epochs)
    pairs = []
    for pair in range(num_pairs):
        seconds = []
        for saving in (CheckpointSettings(), CheckpointSettings(save_minutes=1e6)):
            output = f"{folder}/{pair}-{saving.is_on}"
            results = train.run(recipe, output, saving=saving)
            total = results["seconds"] + results["seconds_saving"]
            seconds.append(total / sum(results["steps_per_task"]))
        pairs.append((seconds[0], seconds[1]))
    return pairs


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--strategy", default="rehearsal")
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.cost:
            pairs = launch(options.ranks, measure_cost, options.epochs, folder)
            for off, on in pairs:
                print(f"{1e3 * off:.3f} ms off, {1e3 * on:.3f} ms on: {on / off:.3f}")
            print(f"median ratio {statistics.median(on / off for off, on in pairs):.3f}")
        elif not torment(options, Path(folder)):
            sys.exit(1)


if __name__ == "__main__":
    main()
