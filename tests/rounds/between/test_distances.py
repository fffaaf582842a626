"""Distances to class means over several ranks, held against one computation over everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ritornello.rounds.between.distances import cosine_distances
from ritornello.testing import connect_collective, run_ranks
from ritornello.transports import LocalTransport, Transport
from ritornello.transports.agreement import gather_padded

SIZES = (7, 0, 12)


def features_of(rank: int) -> tuple[torch.Tensor, np.ndarray]:
    generator = np.random.default_rng(rank)
    labels = generator.integers(3, size=SIZES[rank]) * (1 + rank)
    return torch.from_numpy(generator.normal(size=(SIZES[rank], 5)) + 1).float(), labels


@pytest.mark.parametrize("connect", [LocalTransport.connect, connect_collective])
def test_distances_are_those_of_one_buffer(connect: object) -> None:
    def rank_main(transport: Transport) -> np.ndarray:
        return cosine_distances(*features_of(transport.rank), transport)

    distances = np.concatenate(run_ranks(connect(3), rank_main))  # type: ignore[operator]
    features = np.concatenate([features_of(rank)[0].numpy() for rank in range(3)]).astype(float)
    labels = np.concatenate([features_of(rank)[1] for rank in range(3)])
    for number, (row, label) in enumerate(zip(features, labels, strict=True)):
        mean = features[labels == label].mean(axis=0)
        cosine = row @ mean / np.linalg.norm(row) / np.linalg.norm(mean)
        assert distances[number] == pytest.approx(1 - cosine, abs=1e-12)


def test_means_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cosine_distances(*features_of(2), LocalTransport())
    monkeypatch.setattr("ritornello.rounds.between.distances.NUMBERS_AT_ONCE", 4)
    assert np.array_equal(cosine_distances(*features_of(2), LocalTransport()), whole)


@pytest.mark.parametrize(
    "bad", [torch.full((12, 5), torch.nan), torch.zeros(11, 5), torch.zeros(12, 4), torch.zeros(12)]
)
def test_bad_features_are_an_error_on_every_rank(bad: torch.Tensor) -> None:
    def rank_main(transport: Transport) -> str:
        features, labels = features_of(transport.rank)
        with pytest.raises(ValueError, match="cannot be used") as caught:
            cosine_distances(bad if transport.rank == 2 else features, labels, transport)
        return str(caught.value)

    messages = run_ranks(LocalTransport.connect(3), rank_main)
    assert len(set(messages)) == 1
    if bad.shape != (12, 4):
        assert "rank(s) [2]" in messages[0]


def test_nobody_has_anything() -> None:
    nothing = torch.zeros(0, 0), np.zeros(0, dtype=np.int64)
    assert len(cosine_distances(*nothing, LocalTransport())) == 0


def test_gather_padded_keeps_lengths_and_dtypes() -> None:
    def rank_main(transport: Transport) -> list[np.ndarray]:
        return gather_padded(np.full((transport.rank, 2), transport.rank / 4), transport)

    for gathered in run_ranks(LocalTransport.connect(3), rank_main):
        assert [each.tolist() for each in gathered] == [[], [[0.25] * 2], [[0.5] * 2] * 2]
