"""Damaged and hostile saves: refused, or harmless. ``benchmarks/fuzz.py`` plays thousands."""

from __future__ import annotations

import ast
import pickle
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corruptions import KINDS, check_state_variant, check_variant, prepare
from saved_buffers import SETTINGS, TARGETS, check_load, saved_once

import ritornello

NUM_VARIANTS = 12
"""Of each kind."""

MOST_BYTES = 700e6
"""What loading all of them may add to the memory that the process has had before."""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saves")
    prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def memory_is_bounded(scratch: Path) -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < MOST_BYTES


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in (
        (pickle, "loads"),
        (pickle, "load"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, never)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_save_is_loaded(name: str, target: str, scratch: Path) -> None:
    if name == "without labels" and TARGETS[target].arguments:
        target = "begun"
    outcome = check_load(name, TARGETS[target], saved_once(name, scratch), scratch)
    had_not_begun = name == "not begun" and TARGETS[target].has_begun
    assert outcome == ("refused" if had_not_begun else "loaded")


@pytest.mark.parametrize("kind", KINDS)
def test_variants(kind: str, scratch: Path) -> None:
    outcomes = Counter(check_variant(kind, number, scratch) for number in range(NUM_VARIANTS))
    assert outcomes.total() == NUM_VARIANTS


def test_variants_of_states(scratch: Path) -> None:
    outcomes = Counter(check_state_variant(number, scratch) for number in range(60))
    assert outcomes["refused"] > 20


def test_nothing_that_is_read_can_be_executed() -> None:
    """In all of the library but what tests use: no pickle, no torch.load, no eval."""
    sources = Path(ritornello.__file__).parent
    for path in sources.rglob("*.py"):
        if "experiments" in path.relative_to(sources).parts or path.name == "testing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "runpy"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "torch.load", "np.load"}, path
