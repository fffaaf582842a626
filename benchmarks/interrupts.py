"""Interrupts a buffer's calls at random moments, and looks what has become of it.

    python benchmarks/interrupts.py --count 500

Ctrl-C, a SIGTERM that exits, an alarm's TimeoutError and an exception of one's own, in ``update``,
``save`` and ``load`` on one rank, and in ``update`` on two. Each time the exception must come
through as it is, and the buffer must be consistent and go on; at the end it must hold what one
holds that was never interrupted. Ends with status 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ritornello.testing import spawn_ranks
from test_interrupts import interrupt_again_and_again

COLUMNS = ("interrupts", "inside_calls", "came_through", "inconsistent", "lost")


def main() -> None:
    """Plays it and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="interrupts on each rank and mode")
    count = parser.parse_args().count
    print(f"{'':28s}" + "".join(f"{name.replace('_', ' '):>14s}" for name in COLUMNS))
    all_well = True
    for num_ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            found = spawn_ranks(
                num_ranks, interrupt_again_and_again, num_ranks, count, folder, seconds=3600.0
            )
        for rank, outcomes in enumerate(found):
            if not isinstance(outcomes, dict):
                print(f"rank {rank} of {num_ranks}: {outcomes!r}")
                all_well = False
                continue
            for asynchronous, outcome in outcomes.items():
                mode = "asynchronous" if asynchronous else "asynchronous=False"
                figures = [getattr(outcome, name) for name in COLUMNS]
                print(
                    f"rank {rank} of {num_ranks}, {mode:18s}" + "".join(f"{n:14d}" for n in figures)
                )
                all_well &= outcome.came_through == outcome.interrupts == count
                all_well &= outcome.inconsistent == outcome.lost == 0
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
