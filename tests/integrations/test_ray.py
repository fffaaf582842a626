from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (make clusters)"
)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    """The example; once more with a worker that is killed, bit for bit; then on one worker."""
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ray_ranks.py")), str(tmp_path)],
        env={
            **os.environ,
            "HOME": str(tmp_path),  # where Ray keeps runs
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [average] = re.findall(r"average: ([\d.]+) %", ran.stdout)
    assert float(average) > 80.0
    assert "all is well" in ran.stdout
