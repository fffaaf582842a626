from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def average_of(script: str) -> float:
    """Runs an example under a real torchrun; the average accuracy that it prints, in percent."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ran = subprocess.run(
        [*command, "--nproc-per-node", "2", str(EXAMPLES / script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"average: ([\d.]+) %", ran.stdout)
    assert found, ran.stdout
    return float(found[1])


def test_rehearsal_undoes_forgetting_under_torchrun() -> None:
    assert average_of("train_ddp.py") < 25.0
    assert average_of("train_ddp_rehearsal.py") > 80.0


def test_the_difference_is_small() -> None:
    plain, rehearsal = (
        (EXAMPLES / name).read_text().partition("def main")[2].splitlines()
        for name in ("train_ddp.py", "train_ddp_rehearsal.py")
    )
    changed = [line for line in difflib.ndiff(plain, rehearsal) if line[0] in "+-"]
    assert len(changed) == 3, changed
