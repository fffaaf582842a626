from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed_by(script: str, *arguments: str) -> str:
    """Runs an example on two ranks under a real torchrun; what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ran = subprocess.run(
        [*command, "--nproc-per-node", "2", str(EXAMPLES / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def average_of(script: str) -> float:
    """The average accuracy that an example prints, in percent."""
    printed = printed_by(script)
    found = re.search(r"average: ([\d.]+) %", printed)
    assert found, printed
    return float(found[1])


@pytest.mark.parametrize("loop", ["ddp", "fsdp"])
def test_rehearsal_undoes_forgetting_under_torchrun(loop: str) -> None:
    """Those of the frameworks run in tests/integrations."""
    assert average_of(f"train_{loop}.py") < 25.0
    assert average_of(f"train_{loop}_rehearsal.py") > 80.0


def test_composed_steps_do_so_with_no_sample_more_under_torchrun() -> None:
    assert average_of("train_ddp_composed.py") > 85.0


def test_replay_undoes_forgetting_in_loss_under_torchrun() -> None:
    printed = printed_by("train_text.py", "--kilobytes", "40", "--replay", "0", "0.25")
    learnt = re.search(r"after prose +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert learnt, printed
    found = re.findall(r"(\d+)% replay +([\d.]+) +([\d.]+) +(-?[\d.]+)$", printed, re.MULTILINE)
    after = {int(share): tuple(map(float, losses)) for share, *losses in found}
    assert set(after) == {0, 25}
    prose, code = map(float, learnt.groups())
    for prose_after, code_after, forgotten in after.values():
        assert code_after < code - 0.3
        assert forgotten == pytest.approx(prose_after - prose, abs=0.0011)
    assert after[0][2] > 0.04
    assert after[25][2] < after[0][2] - 0.1


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("train_*_rehearsal.py")), ids=lambda p: p.stem
)
def test_the_difference_is_small(path: Path) -> None:
    """In the code, which begins behind the docstring."""
    plain = path.with_name(path.name.replace("_rehearsal", ""))
    sources = [each.read_text().split('"""', 2)[2].splitlines() for each in (plain, path)]
    changed = [line for line in difflib.ndiff(*sources) if line[0] in "+-"]
    assert 3 <= len(changed) <= 12, changed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_day_new_data(tmp_path: Path) -> None:
    """The example of docs/production.md, as a reader runs it, on one rank."""
    scripts = Path(sys.executable).parent
    ran = subprocess.run(
        ["bash", str(EXAMPLES / "daily.sh")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANKS": "1",
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "2024-05-05: 326 training and 36 test images of 3 classes, new: 9" in ran.stderr
    [*_, last] = re.findall(r"rehearsal\s+([\d.]+) %", ran.stdout)
    assert float(last) > 85.0
    assert "200 representatives, of a capacity of 200" in ran.stdout
    for name in ("results.json", "model.pt", "buffer", "report.html"):
        assert (tmp_path / "living" / name).exists()
