"""``benchmarks/peers.py`` on a small workload, without the other libraries."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)  # its ranks import it, too
    module = importlib.import_module("peers")
    monkeypatch.setattr(module, "WORKLOADS", (module.Workload("tiny", (2, 4), 8, 4, 2, 100),))
    yield module
    del sys.modules["peers"]


def test_what_is_measured_without_other_libraries(
    peers: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = {}
    for name in ("ours", "ours, auto", "(torch.cat alone)", "(plain copies)", "ours, 2 ranks"):
        peers.measure(name, 0.01)
        (line,) = (each for each in capfd.readouterr().out.splitlines() if "RESULT" in each)
        result = json.loads(line.removeprefix("RESULT "))
        assert len(result["seconds_per_round"]) == peers.NUM_BLOCKS, result
        assert all(each > 0 for each in result["seconds_per_round"])
        seconds[name] = result["seconds_per_round"]
    shown = peers.table(peers.WORKLOADS[0], seconds, {"TorchRL in memory": "no torchrl"})
    assert [line[2:36].strip() for line in shown.splitlines()[3:]] == [
        "ours", "ours, auto", "(torch.cat alone)", "(plain copies)", "TorchRL in memory",
        "ours, 2 ranks",
    ]  # fmt: skip
    assert "failed: no torchrl" in shown


def test_figures_are_multiples_of_ours_and_of_the_floor_with_as_many_processes(
    peers: ModuleType,
) -> None:
    seconds = {
        "ours": [1e-3, 2e-3, 3e-3],
        "(plain copies)": [5e-4] * 3,
        "TorchRL in memory": [1e-3] * 3,
        "ours, 2 ranks": [4e-3] * 3,
        "TorchRL remote, 2 ranks": [8e-3] * 3,
    }
    rows = {
        line[2:36].strip(): line[36:].split()
        for line in peers.table(peers.WORKLOADS[0], seconds, {}).splitlines()[2:]
    }
    assert rows == {
        "microseconds per round": ["median", "x", "ours", "x", "floor", "middle", "half"],
        "ours": ["2000", "1.00", "4.00", "1000..3000"],
        "(plain copies)": ["500", "0.25", "1.00", "500..500"],
        "TorchRL in memory": ["1000", "0.50", "2.00", "1000..1000"],
        "ours, 2 ranks": ["4000", "1.00", "nan", "4000..4000"],
        "TorchRL remote, 2 ranks": ["8000", "2.00", "nan", "8000..8000"],
    }
