"""Loads thousands of damaged and hostile checkpoints, each in a process with little memory.

    python benchmarks/fuzz.py --variants 3000

Every variant ends in a ``CheckpointError``, with the buffer as it was, or in a buffer that works;
in nothing else. Accidents (truncation, flipped bits, files mixed up, links and pipes in place of
files) leave checksums wrong; a hostile author has made them right. Prints what came of each kind,
the most memory that one took above what the process had before, and how long the slowest took.
Ends with status 1 at the first fault, and says how to repeat it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "saving"))

from corruptions import KINDS, check_state_variant, check_variant, prepare

STATES = "state_dict"


def play(kind: str, numbers: list[int], seed: int, limit_bytes: int) -> dict[str, Any]:
    """Some variants of a kind; what came of them."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    outcomes, slowest = Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        before = peak_bytes()
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (mapped + limit_bytes, hard))
        for number in numbers:
            began = time.perf_counter()
            try:
                if kind == STATES:
                    outcome = check_state_variant(number, Path(folder), seed)
                else:
                    outcome = check_variant(kind, number, Path(folder), seed)
            except BaseException:
                return {"fault": f"--kind {kind!r} --first {number}\n{traceback.format_exc()}"}
            outcomes[outcome] += 1
            slowest = max(slowest, time.perf_counter() - began)
    return {"outcomes": outcomes, "memory": peak_bytes() - before, "slowest": slowest}


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Plays all kinds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, default=3000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="this one alone")
    parser.add_argument("--first", type=int, default=0, help="the number of the first variant")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB that may be taken")
    options = parser.parse_args()
    kinds = [options.kind] if options.kind else [*KINDS, STATES]
    num_each = -(-options.variants // len(kinds))
    numbers = list(range(options.first, options.first + num_each))
    print(f"{'corruption':42} {'variants':>8} {'refused':>8} {'loaded':>7} {'MB':>6} {'s':>6}")
    total = Counter[str]()
    for kind in kinds:
        arguments = (kind, numbers, options.seed, int(options.memory * 2**30))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(play, arguments)
        if "fault" in found:
            raise SystemExit(f"a fault at {found['fault']}")
        outcomes = found["outcomes"]
        total += outcomes
        print(
            f"{kind:42} {sum(outcomes.values()):8} {outcomes['refused']:8} {outcomes['loaded']:7} "
            f"{found['memory'] / 1e6:6.0f} {found['slowest']:6.2f}",
            flush=True,
        )
    print(f"{'all':42} {sum(total.values()):8} {total['refused']:8} {total['loaded']:7}")


if __name__ == "__main__":
    main()
