"""Damaged and hostile saves: refused, or harmless. ``benchmarks/fuzz.py`` plays thousands."""

from __future__ import annotations

import ast
import json
import os
import pickle
import resource
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corruptions import KINDS, check_state_variant, check_variant, prepare
from hostile_saves import put_shard, read_manifest, shard_path, split, write_manifest
from saved_buffers import SETTINGS, TARGETS, check_load, saved_once

import ritornello
from ritornello import CheckpointError, SavedFolder, forget
from ritornello.experiments.inspection.inspection import inspect_buffer
from ritornello.transports import LocalTransport

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


@pytest.mark.parametrize("field", ["float32", [2], [0]])
def test_a_label_that_is_no_integer(field: Any, scratch: Path, tmp_path: Path) -> None:
    """As the manifest says; whoever reads the folder is told."""
    folder = shutil.copytree(saved_once("class-balanced", scratch), tmp_path / "save")
    content = read_manifest(folder)
    name = "dtype" if isinstance(field, str) else "shape"
    content["layout"]["fields"][content["label"]][name] = field
    write_manifest(folder, content)
    message = "manifest.json is damaged: label=1 is the field batch.*: no integer"
    for read in (SavedFolder, inspect_buffer, lambda each: forget(each, {"label": 1})):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


def test_a_file_that_takes_no_room_gets_no_memory(scratch: Path, tmp_path: Path) -> None:
    """Whatever it says of itself: its checksum is compared first."""
    folder = shutil.copytree(saved_once("class-balanced", scratch), tmp_path / "save")
    path = shard_path(folder, 0)
    header, rest = split(path.read_bytes())
    first, end = header["rows"]["data_offsets"]
    more = {"dtype": "I64", "shape": [2**25], "data_offsets": [first, first + 2**28]}
    header["policy.more"] = more
    header["rows"]["data_offsets"] = [first + 2**28, end + 2**28]
    text = json.dumps(header).encode()
    put_shard(folder, 0, len(text).to_bytes(8, "little") + text + rest[:first])
    os.truncate(path, 8 + len(text) + end + 2**28)
    content = read_manifest(folder)
    content["files"][0]["num_bytes"] = path.stat().st_size
    write_manifest(folder, content)
    assert path.stat().st_blocks * 512 < 2**20

    def load(_: Path) -> None:
        with SETTINGS["class-balanced"].buffer(LocalTransport()) as buffer:
            buffer.load(folder)

    tracemalloc.start()
    try:
        reads = (load, lambda each: list(SavedFolder(each).representatives(0)))
        for read in (*reads, lambda each: forget(each, {"label": 1})):
            with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
                read(folder)
        for check in (True, False):
            assert not inspect_buffer(folder, check).is_whole
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**26


def test_variants_of_states(scratch: Path) -> None:
    outcomes = Counter(check_state_variant(number, scratch) for number in range(60))
    assert outcomes["refused"] > 20


def test_nothing_that_is_read_can_be_executed() -> None:
    """In all of the library but what tests use: no pickle, no torch.load, no eval.

    Ranks of one job may pickle for each other, as those of ``torch.distributed`` do: they run each
    other's code anyway.
    """
    sources = Path(ritornello.__file__).parent
    for path in sources.rglob("*.py"):
        if "experiments" in path.relative_to(sources).parts or path.name == "testing.py":
            continue
        may_pickle = path.relative_to(sources).as_posix() == "rounds/between/uneven.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                odd = {"pickle", "marshal", "shelve", "dill", "runpy"}
                assert not names & (odd - {"pickle"} if may_pickle else odd), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "torch.load", "np.load"}, path
