"""Kills ranks at random moments of start, step, save, load and close, hundreds of times.

    python benchmarks/kills.py --count 300

Jobs of 1 to 3 processes; one rank is killed, or all. The others must end with an error that says
what happened, in time, and the folder must hold a whole save. Prints which moments were met. Ends
with status 1 at the first fault.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "saving"))

from kills import kill_again_and_again


def main() -> None:
    """Plays it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        moments = kill_again_and_again(Path(folder), options.count, options.seed)
    for moment, count in sorted(moments.items()):
        print(f"{moment:<20} {count:>5}")
    print(f"{options.count} kills, no hang, each folder whole, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
