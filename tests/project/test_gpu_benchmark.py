"""``benchmarks/gpu.py`` with small sizes on the CPU, so that it works when there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TESTS = """
import pytest

@pytest.mark.accelerator
def test_passes() -> None:
    pass

@pytest.mark.accelerator
@pytest.mark.skip
def test_is_skipped() -> None:
    pass

def test_is_no_test_of_a_gpu() -> None:
    raise AssertionError
"""
FAILING = """
@pytest.mark.accelerator
@pytest.mark.parametrize("number", range(2))
def test_fails(number: int) -> None:
    assert False
"""


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_the_same_code_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    path = tmp_path / "gpu.json"
    ran = gpu("--device", "cpu", "--tiny", "--json", str(path), "--tests", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "tests marked accelerator: 2, skipped 1, failed 0" in ran.stdout
    figures = json.loads(path.read_text())
    assert figures["machine"]["device"].startswith("CPU")
    cases = {(row["case"], row["dtype"], row["num_ranks"]): row for row in figures["rows"]}
    assert len(cases) == len(figures["rows"]) == 2 * (6 + 4)
    for dtype in ("uint8", "float32"):
        for num_ranks, names in (
            (1, ("shard in 'cpu'", "shard in 'shared'", "gloo with one rank")),
            (2, ("over shared_memory", "over collective")),
        ):
            plain = cases["no buffer, b + r samples", dtype, num_ranks]
            for name in names:
                row = cases[
                    f"rehearse {name}" if "over" in name else f"rehearse, {name}", dtype, num_ranks
                ]
                assert row["num_samples"] == plain["num_samples"] == 10
                assert row["exposed"] == pytest.approx(row["step"] - plain["step"], abs=2e-3)
                assert row["slower"] == pytest.approx(row["exposed"] / plain["step"], abs=2e-2)
                assert row["round"] > 0
                assert row["call"] > 0
                assert name in ran.stdout


def test_tests_that_fail_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS + FAILING)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module
    try:
        spec.loader.exec_module(module)
        assert module.run_tests([tmp_path]) == {"tests": 4, "skipped": 1, "failed": 2}
        with pytest.raises(RuntimeError, match="rank 1 of two on one device failed: boom"):
            module.slowest([[], ValueError("boom")])
    finally:
        del sys.modules["gpu_benchmark"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_a_gpu() -> None:
    ran = gpu()
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "PyTorch finds no accelerator here" in ran.stderr
