"""Kills a process that saves, again and again, and loads what it has left.

    python benchmarks/kill_saves.py --kills 30

Each time the folder must hold a whole save, one of a state that was to be saved, not older than the
last save that had ended. Ends with status 1 at the first fault.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_faults import kill_again_and_again


def main() -> None:
    """Plays it and prints how many kills came in the middle of a save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_torn = kill_again_and_again(Path(folder) / "save", options.kills)
    print(f"{options.kills} kills, {num_torn} of them during a save: each left a whole save behind")


if __name__ == "__main__":
    main()
