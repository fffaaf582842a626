from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ritornello.experiments import metrics, report


def results_of(strategy: str, **changes: Any) -> dict[str, Any]:
    remembered = {"incremental": 0.0, "rehearsal": 0.9, "from-scratch": 0.95}[strategy]
    matrix = (
        np.triu(np.zeros((3, 3)), 1) + np.tril(np.full((3, 3), remembered), -1) + np.eye(3) * 0.98
    )
    return {
        "format": 1, "recipe": "digits", "strategy": strategy, "seed": 0, "world_size": 2,
        "config": {"capacity": 100}, "versions": {"torch": "2"}, "machine": {}, "date": "today",
        "tasks": [
            {"name": f"<{i}>", "classes": [i], "train_samples": 100, "test_samples": 10}
            for i in range(3)
        ],
        "top1": matrix.tolist(), "top5": np.ones((3, 3)).tolist(),
        "average_top1": metrics.average_accuracy(matrix), "average_top5": 1.0,
        "forgetting": metrics.forgetting(matrix), "backward_transfer": -0.1, "forward_transfer": 0.0,
        "seconds": 10.0 if strategy == "incremental" else 12.5, "seconds_per_task": [4.0] * 3,
        "steps_per_task": [9] * 3, "step_seconds": {"load": 1e-4, "wait": 2e-4, "train": 2e-3},
        "buffer": None, "weights_sha256": "0", **changes,
    }  # fmt: skip


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    content = {name: results_of(name) for name in ("incremental", "rehearsal", "from-scratch")}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    return tmp_path


def test_the_page_is_complete_and_self_contained(comparison: Path) -> None:
    path = comparison / "deep" / "report.html"
    report.write_report(report.load_results([comparison]), path)
    page = path.read_text()
    assert page.count("<svg ") == 3 + 2 * 3
    assert page.count("aria-label=") == 9
    assert not re.search(r"<script|<link|@import|<img", page)
    assert "32.7 %" in page  # incremental: (0 + 0 + 98) / 3
    assert "&lt;0&gt;" in page
    assert "<0>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {each[1:] for each in re.findall(r'href="(#[^"]+)"', page)} <= set(ids)


def test_the_summary_says_what_happened(comparison: Path) -> None:
    summary = report.summary_of(report.load_results([comparison]))
    assert "ends at 32.7 % over all tasks: it has forgotten 98.0 %" in summary
    assert "rehearsal from 100 representatives (33.3 % of the data) it ends at 92.7 %" in summary
    assert "in 1.2 times the time" in summary


def test_the_table(comparison: Path) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report.table_of(report.load_results([comparison])))
    lines = console.export_text().splitlines()
    assert len(lines) == 4
    assert "12.5 s (1.2x)" in lines[2]
    assert "0.10/0.20/2.00 ms" in lines[2]


def test_runs_of_one_strategy_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        content = results_of("rehearsal", seed=seed)
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    loaded = report.load_results([tmp_path / "a", tmp_path / "b"])
    assert list(loaded) == [f"rehearsal ({tmp_path / 'a'})", f"rehearsal ({tmp_path / 'b'})"]
    report.write_report(loaded, tmp_path / "report.html")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds neither results.json nor comparison.json"):
        report.load_results([tmp_path])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="no results of format 1"):
        report.load_results([tmp_path])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json is no JSON file"):
        report.load_results([tmp_path])
