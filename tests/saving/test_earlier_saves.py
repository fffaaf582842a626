"""What earlier code has saved is loaded by today's, on the ranks of then and on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from earlier_saves import (
    EARLIER,
    NUM_RANKS,
    digest_of,
    digest_of_streams,
    leaves_of,
    load_and_go_on,
)

from ritornello import CheckpointError, SavedFolder, forget
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport

FOLDER = Path(__file__).parent / "earlier"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
HAS_STREAMS_OF_THEN = digest_of_streams() == EXPECTED["numpy_streams"]

on_any_ranks = pytest.mark.parametrize("num_ranks", NUM_RANKS)
of_any_save = pytest.mark.parametrize("name", EARLIER)


def rows_of(batches: list[Any]) -> list[tuple[Any, ...]]:
    """The samples, as tuples of their fields' bytes, in an order that ranks do not change."""
    fields = zip(*map(leaves_of, batches), strict=True)
    columns = [np.concatenate([leaf.numpy() for leaf in field]) for field in fields]
    return sorted(tuple(each.tobytes() for each in row) for row in zip(*columns, strict=True))


@of_any_save
def test_ranks_hold_what_they_held(name: str) -> None:
    num_ranks = EARLIER[name].num_ranks
    held, _ = load_and_go_on(name, FOLDER / name, num_ranks)
    assert [*map(digest_of, held)] == EXPECTED["saves"][name]["representatives"][str(num_ranks)]


@of_any_save
@on_any_ranks
def test_no_representative_is_lost(name: str, num_ranks: int) -> None:
    saved = SavedFolder(FOLDER / name)
    then = [
        part.batch
        for rank in range(saved.manifest.num_ranks)
        for part in saved.representatives(rank)
    ]
    held, _ = load_and_go_on(name, FOLDER / name, num_ranks)
    now = [batch for of_rank in held for batch in of_rank]
    assert len(rows_of(now)) == saved.manifest.num_held
    assert rows_of(now) == rows_of(then)


@pytest.mark.skipif(not HAS_STREAMS_OF_THEN, reason="this NumPy has other random streams")
@of_any_save
@on_any_ranks
def test_all_goes_on_as_it_did_then_bit_for_bit(name: str, num_ranks: int) -> None:
    held, updates = load_and_go_on(name, FOLDER / name, num_ranks)
    expected = EXPECTED["saves"][name]
    assert [*map(digest_of, held)] == expected["representatives"][str(num_ranks)]
    assert [*map(digest_of, updates)] == expected["updates"][str(num_ranks)]


# With ``rounds_per_exchange``: candidates could wait for the round of a later step.


@on_any_ranks
def test_candidates_that_waited_are_left_out(num_ranks: int) -> None:
    name = "candidates-wait"
    manifest = SavedFolder(FOLDER / name).manifest
    assert (manifest.num_offers, manifest.num_rounds) == (8, 2)
    _, updates = load_and_go_on(name, FOLDER / name, num_ranks)
    for augmented in updates:
        past = [number for values, _ in augmented[:1] for number in values[4:, 0].tolist()]
        assert len(past) == 2  # also in the first step: they are drawn anew
        assert max(past) < 600  # those of steps 6 and 7 have waited


@pytest.mark.parametrize("name", ["candidates-wait", "no-candidates-wait"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_forgetting_says_to_load_and_save_them_first(
    name: str, dry_run: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(FOLDER / name, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = (
        "saved with rounds_per_exchange=3, and may hold candidates that waited for their round: "
        "load it into a buffer and save that, which leaves them out"
    )
    with pytest.raises(CheckpointError, match=message):
        forget(folder, {"label": 1}, dry_run=dry_run)
    (folder / ".lock").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def rank_main(end: Transport) -> None:
        with EARLIER[name].buffer(end) as buffer:
            buffer.load(folder)
            buffer.save(folder)

    run_ranks(LocalTransport.connect(EARLIER[name].num_ranks), rank_main)
    outcome = forget(folder, {"label": 1}, dry_run=dry_run)
    assert outcome.num_removed > 0
    if not dry_run:
        saved = SavedFolder(folder)
        labels = [
            label
            for rank in range(saved.manifest.num_ranks)
            for part in saved.representatives(rank)
            if part.labels is not None
            for label in part.labels.tolist()
        ]
        assert len(labels) == outcome.num_left
        assert 1 not in labels
