"""``benchmarks/methods.py`` on two methods with a few steps each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from ritornello.experiments.recipes.named import recipe_named

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "methods.py"


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not SCRIPT.exists():
        pytest.skip("needs the benchmarks beside the tests")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("methods", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "methods", module)
    spec.loader.exec_module(module)
    return module


def test_the_table(
    methods: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    command = [
        "methods.py", "digits", "--settings", "iterations=3,num_tasks=2,capacity=40",
        "--seeds", "0", "1", "--output", str(tmp_path), "--sent-steps", "0", "--repeats", "1",
        "--methods", "incremental", "stored:strategy=rehearsal,capacity=100", "joint",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    methods.main()
    first = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    assert rows[0] == [
        "method", "settings", "top-1", "forgetting", "time", "held", "sent per step"
    ]  # fmt: skip
    assert [row[0] for row in rows[2:]] == ["incremental", "stored", "joint"]
    assert [row[5:] for row in rows[2:]] == [
        ["0", "-"],
        ["8 kB", "-"],  # 100 records of 64 + 8 bytes, each in whole 16
        ["all data: 86.2 kB", "-"],
    ]
    assert rows[2][4] == "1.00"
    assert all(float(row[4]) > 0 for row in rows[2:])
    assert rows[3][1] == "strategy=rehearsal, capacity=100"
    assert rows[4][3] == "-"  # what waits for all data forgets nothing
    assert all("±" in row[2] for row in rows[2:])
    monkeypatch.setattr(methods, "launch", lambda *_: pytest.fail("it was run before"))
    methods.main()
    assert capsys.readouterr().out == first


def test_what_methods_are_written_as(methods: Any) -> None:
    changes = methods.changes_in("alpha=0.5,strategy=der++,milestones=((1,0.3),(2,0.1)),averaged=0")
    milestones = ((1, 0.3), (2, 0.1))
    assert changes == {"alpha": 0.5, "strategy": "der++", "milestones": milestones, "averaged": 0}
    base = recipe_named("digits")
    method = methods.method_of("fedssi:ranks=2,local_steps=3", base)
    assert (method.num_ranks, method.recipe.local_steps) == (2, 3)
    assert "fedssi" not in methods.usual_methods(base)
    assert {"si", "der", "generative", "joint"} <= set(methods.usual_methods(base))
    for wrong, message in (
        ("si:strong", "'strong': write FIELD=VALUE"),
        ("si:strong=1", "method 'si:strong=1': .* argument 'strong'"),
        ("reharsal", "strategy='reharsal': there are incremental, rehearsal"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.method_of(wrong, base)
    assert [methods.as_bytes(each) for each in (0.4, 999, 3_088_000, 2.5e12)] == [
        "0", "999 B", "3.09 MB", "2.5e+03 GB"
    ]  # fmt: skip


def test_times_are_measured_once(methods: Any, tmp_path: Path, monkeypatch: Any) -> None:
    measured: list[tuple[str, int]] = []

    def used(recipe: Any) -> float:
        measured.append((recipe.strategy, recipe.epochs))
        return {"incremental": 2.0, "rehearsal": 3.0, "gdumb": 4.0, "ridge": 1.0}[recipe.strategy]

    monkeypatch.setattr(methods, "seconds_used", used)
    base = recipe_named("digits", device="cpu")
    written = ["incremental", "rehearsal", "fedssi:ranks=2,local_steps=3", "gdumb", "ridge"]
    written += ["rehearsal:strategy=gdumb"]  # two rows of one name
    rows = [methods.method_of(each, base) for each in written]
    for _ in range(2):
        found = methods.multiples(rows, {"epochs": 1}, 2, tmp_path / "times.json")
        assert found == [1.0, 1.5, None, 2.0, 0.5, 2.0]
    short = [("incremental", 1), ("rehearsal", 1)]
    whole = [("incremental", 12), ("gdumb", 12), ("ridge", 12)]  # a task passes by once
    assert sorted(measured[1:]) == sorted(2 * (short + whole))  # the first one does not count
