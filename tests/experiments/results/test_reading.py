from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_results import results_of

from ritornello.experiments.results.reading import archive, find_results, load_results


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_a_comparison_of_before_there_were_commands(tmp_path: Path) -> None:
    content = {name: results_of(name) for name in ("incremental", "rehearsal", "from-scratch")}
    write(tmp_path / "comparison.json", content)
    assert load_results([tmp_path]) == content
    assert list(load_results([tmp_path])) == list(content)


def test_a_comparison_goes_before_the_runs_that_it_holds(tmp_path: Path) -> None:
    content = {f"any, seed {i}": results_of("rehearsal", seed=i) for i in range(2)}
    write(tmp_path / "comparison.json", content)
    write(tmp_path / "results.json", results_of("incremental"))
    assert list(load_results([tmp_path])) == ["rehearsal, seed 0", "rehearsal, seed 1"]


def test_runs_are_told_apart_by_what_differs_or_by_their_folders(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 2)):
        write(tmp_path / name / "results.json", results_of("rehearsal", seed=seed))
    a, b, c = (tmp_path / name for name in "abc")
    assert list(load_results([a, b])) == ["rehearsal, seed 1", "rehearsal, seed 2"]
    assert list(load_results([b, c])) == [f"rehearsal ({b})", f"rehearsal ({c})"]
    assert len(load_results([b, b])) == 2


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds neither results.json nor comparison.json"):
        load_results([tmp_path])
    for content in ({}, [], 3, {"format": 2, "strategy": "rehearsal"}, {"format": 1}, {"a": 1}):
        write(tmp_path / "results.json", content)
        with pytest.raises(ValueError, match="results.json holds no results of format 1"):
            load_results([tmp_path])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json is no JSON file"):
        load_results([tmp_path])


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    runs = {name: results_of(name) for name in ("incremental", "rehearsal")}
    write(tmp_path / "new" / "comparison.json", runs)
    for name, run in runs.items():
        write(tmp_path / "new" / name / "results.json", run)
    old = results_of("rehearsal", date="2025-01-01")
    write(tmp_path / "old" / "comparison.json", {"rehearsal": old})
    assert find_results([tmp_path]) == [*runs.values(), old]
    assert find_results([tmp_path / "old", tmp_path]) == [old, *runs.values()]
    assert find_results([tmp_path / "old" / "comparison.json"]) == [old]


def test_nothing_is_found(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="neither a file, nor a folder with"):
            find_results([source])


def test_an_archive_keeps_what_matters(tmp_path: Path) -> None:
    stats = {"capacity": 100, "held_per_class": {"1": 50}, "seconds_waited": 0.5}
    full = results_of("rehearsal", top1=[[1 / 3]], buffer=stats, command="ritornello run digits")
    other = results_of("incremental")
    path = tmp_path / "deep" / "archive.json"
    archive([full, other], path)
    kept, old = find_results([path])
    assert "command" not in old
    assert kept["top1"] == [[0.3333]]
    assert kept["buffer"] == {"capacity": 100, "seconds_waited": 0.5}
    assert not {"tasks", "weights_sha256", "seconds_per_task"} & set(kept)
    unchanged = set(kept) - {"top1", "buffer"}
    assert {name: kept[name] for name in unchanged} == {name: full[name] for name in unchanged}
    assert len(path.read_text().splitlines()) == 4  # A line per run: changes are easy to read.
    archive([kept, old], tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_an_archive_among_the_folders(tmp_path: Path) -> None:
    run = results_of("rehearsal")
    archive([run], tmp_path / "docs" / "results.json")
    write(tmp_path / "runs" / "results.json", run)
    write(tmp_path / "runs" / "more" / "results.json", results_of("incremental"))
    assert [each["strategy"] for each in find_results([tmp_path])] == ["rehearsal", "incremental"]
