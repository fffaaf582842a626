"""Fields of what is stored are made anew, in place, by each rank for its own shard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ritornello import BufferClosedError, PeerLostError, RehearsalBuffer
from ritornello.records.shard import LARGE_RECORD_BYTES
from ritornello.testing import connect_shared_memory, run_ranks, spawn_ranks
from ritornello.transports import LocalTransport, Transport

Sample = tuple[Tensor, Tensor, Tensor]
"""A number, its label, and its number again with a sign, plus twice that of rewritings."""


def batch_of(step: int, rank: int = 0, width: int = 3) -> Sample:
    numbers = (step * 8 + rank) * 8 + torch.arange(8)
    return numbers, numbers % 5, numbers[:, None].repeat(1, width).float()


def make(end: Transport | None = None, **arguments: Any) -> RehearsalBuffer:
    given: dict[str, Any] = {"num_representatives": 5, "num_candidates": 6, **arguments}
    if end is not None:
        given["transport"] = end
    return RehearsalBuffer(30 * (end.num_ranks if end else 1), **given)


def add_half(batch: Sample) -> Tensor:
    return batch[2] + 0.5


def halves_of(batch: Sample | None) -> Tensor:
    """How often each sample was rewritten by ``add_half``; all of it must agree."""
    assert batch is not None
    numbers, labels, targets = batch
    halves = (targets - numbers[:, None]) * 2
    assert torch.equal(labels, numbers % 5)
    assert torch.equal(halves, halves[:, :1].expand_as(halves))
    return halves[:, 0]


def held(buffer: RehearsalBuffer) -> Sample:
    parts = list(buffer.representatives())
    return tuple(torch.cat(leaves) for leaves in zip(*parts, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_field_is_rewritten_and_all_else_stays(batch_size: int, asynchronous: bool) -> None:
    with make(asynchronous=asynchronous) as buffer:
        for step in range(20):
            buffer.update(batch_of(step))
        before, sizes = held(buffer), []

        def function(batch: Sample) -> Tensor:
            sizes.append(len(batch[0]))
            made = add_half(batch)
            for leaf in batch:
                leaf.zero_()  # they are copies
            return made

        buffer.rewrite(function, fields=2, batch_size=batch_size)
        after = held(buffer)
        assert sum(sizes) == 30
        assert max(sizes) == min(batch_size, 30)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
        assert torch.equal(before[2] + 0.5, after[2])
        # What was drawn for the next step stays as it was drawn; from then on all is new.
        assert not halves_of(tuple(leaf[8:] for leaf in buffer.update(batch_of(20)))).any()  # type: ignore[arg-type]
        drawn = buffer.draw()
        assert drawn is not None
        was_offered = drawn[0] >= 20 * 64
        assert torch.equal(halves_of(drawn), (~was_offered).float())


Make = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("fields", "function"),
    [
        ("flag", lambda batch: ~batch["flag"]),
        (["flag"], lambda batch: (~batch["flag"],)),
        (["flag"], lambda batch: {"flag": ~batch["flag"]}),
        (("of", 1), lambda batch: batch["of"][1] + 1),
        ([("of", 1), "flag"], lambda batch: (batch["of"][1] + 1, ~batch["flag"])),
        (["flag", ("of", 1)], lambda batch: [~batch["flag"], batch["of"][1] + 1]),
        (
            ["flag", ("of", 1)],
            lambda batch: {("of", 1): batch["of"][1] + 1, "flag": ~batch["flag"]},
        ),
    ],
)
def test_fields_are_named_as_the_label_is(fields: Any, function: Make) -> None:
    numbers = torch.arange(12, dtype=torch.uint8)
    batch = {
        "of": (numbers, numbers[:, None, None].repeat(1, 2, 5).to(torch.float16)),
        "label": numbers.long() % 3,
        "flag": numbers % 2 == 0,
    }
    with RehearsalBuffer(12, num_representatives=12, label="label") as buffer:
        buffer.update(batch)
        buffer.rewrite(function, fields)
        ((after),) = buffer.representatives()
        order = after["of"][0].long()
        named = fields if isinstance(fields, list) else [fields]
        flags = ~batch["flag"] if "flag" in named else batch["flag"]
        second = batch["of"][1] + 1 if ("of", 1) in named else batch["of"][1]
        assert torch.equal(after["flag"], flags[order])
        assert torch.equal(after["of"][1], second[order])
        assert torch.equal(after["label"], batch["label"][order])


def test_samples_that_are_one_tensor_without_labels() -> None:
    with RehearsalBuffer(6, num_representatives=2, label=None, selection="reservoir") as buffer:
        buffer.update(torch.arange(6).float())
        buffer.rewrite(lambda batch: -batch, fields=())
        (after,) = buffer.representatives()
        assert sorted(after.tolist()) == [-5, -4, -3, -2, -1, 0]


def test_values_may_be_views_and_carry_a_gradient() -> None:
    with make() as buffer:
        buffer.update(batch_of(0))
        weight = torch.ones((), requires_grad=True)
        buffer.rewrite(lambda batch: (batch[2] * weight + 0.5).T.contiguous().T, fields=2)
        assert set(halves_of(held(buffer)).tolist()) == {1.0}
        assert not held(buffer)[2].requires_grad


def test_an_empty_buffer_has_nothing_to_rewrite() -> None:
    def never(batch: Any) -> Tensor:
        raise AssertionError

    with make() as buffer:
        buffer.rewrite(never, fields=2)
        buffer.update(tuple(leaf[:0] for leaf in batch_of(0)))
        buffer.rewrite(never, fields=2)
        buffer.close()
        with pytest.raises(BufferClosedError, match="rewrite after close"):
            buffer.rewrite(never, fields=2)


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (7, r"fields=7 names no leaf of the samples; there are batch\[0\]: torch.int64 \[\]; .*"),
        ((2, 0), r"fields=\(2, 0\) names no leaf .* Give an index or key, a tuple of them"),
        ([2, "logits"], "fields='logits' names no leaf of the samples"),
        (1, "fields=1 is the class label, by which representatives were admitted: it stays"),
        ([2, 1], "fields=1 is the class label"),
        ([2, 2], r"fields=\[2, 2\] names 2 twice"),
        ([], r"fields=\[\] names no leaf of the samples; name at least one"),
    ],
)
def test_fields_that_cannot_be_rewritten(fields: Any, message: str) -> None:
    with make() as buffer:
        buffer.update(batch_of(0))
        with pytest.raises(ValueError, match=message):
            buffer.rewrite(add_half, fields)
        assert not halves_of(held(buffer)).any()


@pytest.mark.parametrize(
    ("fields", "function", "kind", "message"),
    [
        (
            2,
            lambda batch: batch[2].double(),
            ValueError,
            r"gave batch\[2\] as torch.float64 \[6, 3\], but for 6 samples it must be "
            r"torch.float32 \[6, 3\]: nothing is converted, .* \.to\(dtype\)",
        ),
        (2, lambda batch: batch[2][:, :2], ValueError, r"\[6, 2\], but for 6 .* \[6, 3\]"),
        (2, lambda batch: batch[2][1:], ValueError, r"\[5, 3\], but for 6 .* \[6, 3\]"),
        (2, lambda batch: batch[2].numpy(), TypeError, r"gave batch\[2\] as a ndarray: it must"),
        (2, lambda batch: None, TypeError, r"gave batch\[2\] as a NoneType: it must be a tensor"),
        (2, lambda batch: (batch[2],), TypeError, r"gave batch\[2\] as a tuple"),
        ([2, 0], lambda batch: batch[2], ValueError, r"gave Tensor, but must give a tuple of 2"),
        ([2, 0], lambda batch: (batch[2],), ValueError, r"gave 1, but must give a tuple of 2, or"),
        ([2, 0], lambda batch: {2: batch[2]}, ValueError, r"gave \[2\], but must give \[2, 0\]"),
        ([0, 2], lambda batch: (batch[2], batch[0]), ValueError, r"gave batch\[0\] as torch.float"),
    ],
)
def test_values_that_do_not_fit(
    fields: Any, function: Make, kind: type[Exception], message: str
) -> None:
    with make() as buffer:
        for step in range(20):
            buffer.update(batch_of(step))
        before = held(buffer)
        with pytest.raises(kind, match=message):
            buffer.rewrite(function, fields, batch_size=6)
        for one, other in zip(before, held(buffer), strict=True):
            assert torch.equal(one, other)
        buffer.update(batch_of(20))  # it goes on


def test_the_rank_is_named_where_there_are_several() -> None:
    def rank_main(end: Transport) -> None:
        with make(end) as buffer:
            buffer.update(batch_of(0, end.rank))
            with pytest.raises(ValueError, match=f"rank {end.rank}: rewrite: fields=9 names no"):
                buffer.rewrite(add_half, fields=9)
            with pytest.raises(ValueError, match=f"rank {end.rank}: rewrite: the function gave"):
                buffer.rewrite(lambda batch: batch[0], fields=2)

    run_ranks(LocalTransport.connect(2, 10.0), rank_main)


def test_batches_of_nothing() -> None:
    with make() as buffer, pytest.raises(ValueError, match="batch_size=0: it must be at least 1"):
        buffer.rewrite(add_half, fields=2, batch_size=0)


def test_a_function_that_uses_the_buffer() -> None:
    with make() as buffer:
        buffer.update(batch_of(0))

        def function(batch: Sample) -> Tensor:
            buffer.update(batch_of(1))
            return add_half(batch)

        with pytest.raises(RuntimeError, match="has called update, draw or offer: the buffer goes"):
            buffer.rewrite(function, fields=2)
        assert not halves_of(held(buffer)).any()


def test_a_peer_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    end = LocalTransport()

    def gone() -> None:
        raise PeerLostError("rank 3 has ended or was killed", (3,))

    with make(end) as buffer:
        buffer.update(batch_of(0))
        len(buffer)
        monkeypatch.setattr(end, "await_readers", gone)
        for call in (lambda: buffer.rewrite(add_half, 2), lambda: buffer.update(batch_of(1))):
            with pytest.raises(PeerLostError, match="rewrite failed: rank 3 has ended") as lost:
                call()
            assert lost.value.peers == (3,)


# What fails in the middle.


def rewritten_by(function: Callable[[Sample], Tensor], error: type[BaseException]) -> list[float]:
    with make() as buffer:
        for step in range(20):
            buffer.update(batch_of(step))
        with pytest.raises(error):
            buffer.rewrite(function, fields=2, batch_size=8)
        halves = halves_of(held(buffer)).tolist()
        buffer.rewrite(add_half, fields=2)
        assert halves_of(held(buffer)).tolist() == [each + 1 for each in halves]
        for step in range(20, 25):
            halves_of(buffer.update(batch_of(step)))
    return halves


@pytest.mark.parametrize("error", [OverflowError, KeyboardInterrupt])
def test_batches_before_an_error_are_rewritten_and_others_are_not(
    error: type[BaseException],
) -> None:
    num_calls = 0

    def function(batch: Sample) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise error
        return add_half(batch)

    assert rewritten_by(function, error) == [1.0] * 16 + [0.0] * 14


@pytest.mark.parametrize("num_written", range(5))
def test_an_interrupt_leaves_each_record_whole(num_written: int) -> None:
    """Large records are written one by one, small ones with one call that nothing interrupts."""

    class Interrupted:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.num_written = array, 0

        def __setitem__(self, at: Any, words: np.ndarray) -> None:
            if self.num_written == num_written:
                raise KeyboardInterrupt
            self.array[at] = words
            self.num_written += 1

    width = LARGE_RECORD_BYTES // 4
    with make() as buffer:
        for step in range(5):
            buffer.update(batch_of(step, width=width))
        len(buffer)
        shard = buffer._steps.rounds.shard
        assert shard is not None
        array = shard._array
        shard._array = Interrupted(array)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            buffer.rewrite(add_half, fields=2)
        shard._array = array
        halves = halves_of(held(buffer)).tolist()
        assert halves == [1.0] * num_written + [0.0] * (len(halves) - num_written)
        buffer.update(batch_of(5, width=width))


# Other ranks.


def stream_with_rewriting(end: Transport, **arguments: Any) -> list[Sample]:
    """What a rank got in a stream at whose steps 10 and 15 all is made anew."""
    found = []
    with make(end, **arguments) as buffer:
        for step in range(20):
            if step in (10, 15):
                buffer.rewrite(add_half, fields=2, batch_size=4)
            found.append(buffer.update(batch_of(step, end.rank)))
    return found


def check(everyone: list[list[Sample]]) -> None:
    for found in everyone:
        for step, batch in enumerate(found):
            halves = halves_of(tuple(leaf[8:] for leaf in batch))  # type: ignore[arg-type]
            # Drawn in the round before, after what had been rewritten and what was offered until then.
            rewritten = [each for each in (10, 15) if each <= step - 1]
            offered_in = batch[0][8:] // 64
            wanted = [sum(each > offered for each in rewritten) for offered in offered_in.tolist()]
            assert halves.tolist() == wanted


def assert_same(ours: list[list[Sample]], theirs: list[list[Sample]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for batch, again in zip(mine, other, strict=True):
            assert all(map(torch.equal, batch, again))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_each_rank_rewrites_its_own_shard(num_ranks: int) -> None:
    everyone = run_ranks(LocalTransport.connect(num_ranks, 30.0), stream_with_rewriting)
    check(everyone)
    again = run_ranks(
        LocalTransport.connect(num_ranks, 30.0),
        lambda end: stream_with_rewriting(end, asynchronous=False),
    )
    assert_same(everyone, again)


@pytest.mark.parametrize("storage", ["auto", "shared", "file"])
def test_in_memory_that_ranks_share(storage: str, tmp_path: Path) -> None:
    given = f"file:{tmp_path}" if storage == "file" else storage
    ends = connect_shared_memory(2, 30.0)
    everyone = run_ranks(ends, lambda end: stream_with_rewriting(end, storage=given))
    check(everyone)
    assert_same(everyone, run_ranks(LocalTransport.connect(2, 30.0), stream_with_rewriting))


def in_a_process(rank: int) -> list[Any]:
    with RehearsalBuffer(60, num_representatives=5, num_candidates=6) as buffer:
        found = []
        for step in range(20):
            if step in (10, 15):
                buffer.rewrite(add_half, fields=2, batch_size=4)
            found.append([leaf.numpy() for leaf in buffer.update(batch_of(step, rank))])
        dist.barrier()
    return found


def test_between_processes() -> None:
    everyone = [
        [tuple(map(torch.from_numpy, batch)) for batch in found]  # type: ignore[union-attr]
        for found in spawn_ranks(2, in_a_process)
    ]
    check(everyone)  # type: ignore[arg-type]
    by_threads = run_ranks(LocalTransport.connect(2, 30.0), stream_with_rewriting)
    assert_same(everyone, by_threads)  # type: ignore[arg-type]


def test_who_still_reads_gets_what_was_there() -> None:
    """One rank's round takes long, while the other has begun to rewrite."""
    has_rewritten = threading.Event()

    def rank_main(end: Transport) -> Any:
        with make(end) as buffer:
            for step in range(10):
                buffer.update(batch_of(step, end.rank))
            len(buffer)
            if end.rank == 1:
                shard = buffer._steps.rounds.shard
                host: Any = shard.all_shards  # type: ignore[union-attr]
                gather = host.gather

                def slowly(*arguments: Any) -> None:
                    assert not has_rewritten.wait(0.5)
                    gather(*arguments)

                host.gather = slowly
            halves_of(buffer.update(batch_of(10, end.rank)))
            if end.rank == 0:
                buffer.rewrite(add_half, fields=2)
                has_rewritten.set()
                return None
            drawn = buffer.draw()
            assert drawn is not None
            host.gather = gather
            return halves_of(drawn).tolist()

    _, drawn = run_ranks(connect_shared_memory(2, 30.0), rank_main)
    assert drawn == [0.0] * 5


# Saving.


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A save in the background writes nothing before the event is set."""
    may_write = threading.Event()
    monkeypatch.setattr("ritornello.saving.writing.PIECE_BYTES", 64)
    from ritornello.saving.writing import SaveUnderWay

    step = SaveUnderWay.step

    def held_up(self: SaveUnderWay) -> float | None:
        if threading.current_thread() is not threading.main_thread() and not may_write.is_set():
            return 0.01
        return step(self)

    monkeypatch.setattr(SaveUnderWay, "step", held_up)
    yield may_write
    may_write.set()


def test_a_save_in_the_background_writes_what_was_there(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    with make() as buffer:
        for step in range(20):
            buffer.update(batch_of(step))
        before = held(buffer)
        buffer.save(tmp_path, background=True)
        buffer.rewrite(add_half, fields=2, batch_size=4)
        slow_disk.set()
        buffer.rewrite(add_half, fields=2, batch_size=4)
        buffer.wait_until_saved()
        assert set(halves_of(held(buffer)).tolist()) == {2.0}
    with make() as other:
        other.load(tmp_path)
        for one, saved in zip(before, held(other), strict=True):
            assert torch.equal(one, saved)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_was_rewritten_is_saved(num_ranks: int, tmp_path: Path) -> None:
    def rank_main(end: Transport) -> list[Sample]:
        with make(end) as buffer:
            for step in range(20):
                buffer.update(batch_of(step, end.rank))
            buffer.rewrite(add_half, fields=2)
            buffer.save(tmp_path)
            return [buffer.update(batch_of(step, end.rank)) for step in range(20, 30)]

    def loading(end: Transport) -> list[Sample]:
        with make(end) as buffer:
            buffer.load(tmp_path)
            buffer.rewrite(lambda batch: batch[2], fields=2)  # before any mini-batch
            assert set(halves_of(held(buffer)).tolist()) == {1.0}
            return [buffer.update(batch_of(step, end.rank)) for step in range(20, 30)]

    whole = run_ranks(LocalTransport.connect(2, 30.0), rank_main)
    found = run_ranks(LocalTransport.connect(num_ranks, 30.0), loading)
    if num_ranks == 2:
        assert_same(whole, found)
