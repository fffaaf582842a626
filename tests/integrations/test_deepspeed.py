from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ritornello import RehearsalBuffer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (make clusters)",
)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_and_on_one(tmp_path: Path) -> None:
    """The example; gradients by hand; saved and on, bit for bit. The buffer goes on on one rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("deepspeed_ranks.py")
    ran = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    [average] = re.findall(r"average: ([\d.]+) %", ran.stdout)
    assert float(average) > 80.0
    assert ran.stdout.count("all is well on rank") == 2

    with RehearsalBuffer(24, num_representatives=3) as buffer:
        buffer.load(tmp_path / "2" / "six" / "buffer")
        assert buffer.stats().num_held == 24
