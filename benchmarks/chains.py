"""Plays thousands of random chains of update, save, load, reshard, forget and convert.

    python benchmarks/chains.py --count 2000 --seed 0

Over policies, layouts, 1 to 4 ranks (threads of this process) and capacities. After each link what
is held must be what was held before, as docs/saving.md says. Ends with status 1 at the first fault,
and says how to repeat it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "saving"))

from chains import play


def main() -> None:
    """Plays them and says how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first chain")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".* distinct values so far")  # more classes than slots
    began = time.monotonic()
    for number in range(options.first, options.first + options.count):
        with tempfile.TemporaryDirectory() as folder:
            play(options.seed, number, Path(folder))
    print(f"{options.count} chains, no surprise, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
