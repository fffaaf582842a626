"""Samples that are stored in another form than they are trained on, through the whole buffer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ritornello import RehearsalBuffer, evenly, rehearse
from ritornello.testing import check_consistent, run_ranks
from ritornello.transports import LocalTransport, Transport

Batch = dict[str, Any]


def mini_batch(step: int, rank: int = 0, size: int = 5) -> Batch:
    """Pixels that say which sample it is, the file that they come from, and what is not stored."""
    numbers = 1000 * rank + 10 * step + torch.arange(size)
    return {
        "pixels": pixels_of(numbers),
        "label": numbers % 3,
        "file": [file_of(number) for number in numbers.tolist()],
    }


def pixels_of(numbers: Tensor) -> Tensor:
    return numbers[:, None, None] + torch.linspace(0, 1, 4096).view(64, 64)


def file_of(number: int) -> Tensor:
    return torch.tensor([number, *[7] * (number % 5)])


def stored_of(batch: Batch) -> tuple[Any, Tensor]:
    return batch["file"], batch["label"]


def trained_on(stored: tuple[Any, Tensor]) -> Batch:
    files, labels = stored
    numbers = torch.tensor([int(file[0]) for file in files], dtype=torch.int64)
    return {"pixels": pixels_of(numbers), "label": labels, "file": files}


def make_buffer(transport: Transport | str = "local", **arguments: Any) -> RehearsalBuffer:
    given: dict[str, Any] = {
        "num_representatives": 4,
        "capacity_bytes": 6000,
        "encode": stored_of,
        "decode": trained_on,
    }
    return RehearsalBuffer(40, transport=transport, **(given | arguments))


def check(batch: Batch) -> list[int]:
    """All leaves belong together; which samples they are."""
    numbers = [int(file[0]) for file in batch["file"]]
    assert torch.equal(batch["pixels"], pixels_of(torch.tensor(numbers)))
    assert batch["label"].tolist() == [number % 3 for number in numbers]
    for number, file in zip(numbers, batch["file"], strict=True):
        assert torch.equal(file, file_of(number))
    return numbers


def train(buffer: RehearsalBuffer, rank: int, steps: range) -> list[list[int]]:
    return [
        check(buffer.update(mini_batch(step, rank, (5, 0, 8)[step % 3 if step else 0])))
        for step in steps
    ]


@pytest.mark.parametrize("num_draws", [1, 2])
def test_representatives_come_as_they_are_trained_on(num_draws: int) -> None:
    with make_buffer(num_draws=num_draws) as buffer:
        seen = train(buffer, 0, range(30))
        assert {len(each) for each in seen[3:]} == {size + 4 * num_draws for size in (5, 0, 8)}
        assert buffer.num_past == 4 * num_draws
        assert int(buffer.past_mask.sum()) == 4 * num_draws
        assert buffer.stats().shard_bytes < 10_000  # pixels would be 655,360
        check_consistent(buffer)
        held = [number for batch in buffer.representatives(7) for number in check(batch)]
        assert len(held) == len(buffer)
        drawn: Any = buffer.draw()
        for each in [drawn] if num_draws == 1 else drawn:
            assert set(check(each)) <= set(held)
            each["pixels"].zero_()  # the caller's own
        buffer.offer(mini_batch(40))
        check(buffer.update(mini_batch(41)))


def test_what_is_drawn_is_what_one_form_alone_would_give() -> None:
    with make_buffer() as buffer:
        seen = train(buffer, 0, range(20))
    with make_buffer(encode=None, decode=None) as buffer:
        plain = []
        for step in range(20):
            batch = mini_batch(step, 0, (5, 0, 8)[step % 3 if step else 0])
            files, _ = buffer.update((batch["file"], batch["label"]))
            plain.append([int(file[0]) for file in files])
    assert seen == plain


def test_it_is_decoded_in_the_background_without_gradients() -> None:
    calls = list[tuple[str, bool]]()

    def decode(stored: tuple[Any, Tensor]) -> Batch:
        calls.append((threading.current_thread().name, torch.is_grad_enabled()))
        return trained_on(stored)

    with make_buffer(decode=decode) as buffer:
        train(buffer, 0, range(4))
        len(buffer)
        assert len(calls) == 4
        buffer.fill([mini_batch(50), mini_batch(51)])
        assert len(calls) == 4  # what nobody gets is not decoded
        train(buffer, 0, range(4, 6))
        state = buffer.state_dict()
    with make_buffer(decode=decode) as buffer:
        calls.clear()
        buffer.load_state_dict(state)
        assert not calls
        train(buffer, 0, range(6, 7))
    assert {*calls} == {("ritornello-rank-0", False)}


def test_ranks_transports_and_going_on(tmp_path: Path) -> None:
    def rank_main(end: Transport, asynchronous: bool) -> list[Any]:
        with make_buffer(end, asynchronous=asynchronous) as buffer:
            train(buffer, end.rank, range(9))
            buffer.save(tmp_path)
            return train(buffer, end.rank, range(9, 15))

    def again(end: Transport) -> list[Any]:
        with make_buffer(end) as buffer:
            buffer.load(tmp_path)
            return train(buffer, end.rank, range(9, 15))

    first = run_ranks(LocalTransport.connect(2), lambda end: rank_main(end, True))
    assert run_ranks(LocalTransport.connect(2), lambda end: rank_main(end, False)) == first
    assert run_ranks(LocalTransport.connect(2), again) == first
    assert any(number >= 1000 for numbers in first[0] for number in numbers)


def test_rehearse_gives_the_same() -> None:
    batches = [mini_batch(step) for step in range(12)]
    with make_buffer() as buffer:
        plain = [check(buffer.update(batch)) for batch in batches]
    with make_buffer() as buffer:
        ahead = [check(batch) for batch in rehearse(batches, buffer)]
        check(buffer.update(mini_batch(12)))
    assert ahead == plain


def test_ranks_with_unequally_many_mini_batches() -> None:
    def rank_main(end: Transport) -> list[int]:
        batches = [mini_batch(step, end.rank) for step in range(3 + 4 * end.rank)]
        with make_buffer(end) as buffer:
            return [len(check(buffer.update(batch))) for batch in evenly(batches, buffer)]

    shorter, longer = run_ranks(LocalTransport.connect(2), rank_main)
    assert shorter[3:] == [4] * 4
    assert longer[3:] == [9] * 4


@pytest.mark.parametrize("call", ["evenly", "fill"])
@pytest.mark.parametrize("encodes", [True, False])
def test_a_rank_that_never_had_a_mini_batch_learns_of_both_forms(call: str, encodes: bool) -> None:
    arguments: dict[str, Any] = {}
    if not encodes:
        arguments = {
            "encode": None,
            "decode": lambda stored: dict(stored),
            "label": "label",
            "capacity_bytes": 10**6,
        }

    def rank_main(end: Transport) -> list[int]:
        batches = [mini_batch(step, end.rank) for step in range(4)] * end.rank
        with make_buffer(end, **arguments) as buffer:
            if call == "fill":
                assert buffer.fill(batches) == 20
                return check(buffer.update(mini_batch(9, end.rank)))
            joined = [check(buffer.update(batch)) for batch in evenly(batches, buffer)]
            return joined[-1]

    without, _ = run_ranks(LocalTransport.connect(2), rank_main)
    assert len(without) == (9 if call == "fill" else 4)
    assert max(without) >= 1000


def test_an_empty_mini_batch_does_not_say_what_is_trained_on() -> None:
    with make_buffer(
        encode=None, decode=lambda stored: stored, label="label", capacity_bytes=10**6
    ) as buffer:
        buffer.fill([mini_batch(0), mini_batch(1)])
        nothing = mini_batch(2, size=0)
        assert len(check(buffer.update(nothing))) == 4
        assert len(check(buffer.update(mini_batch(3)))) == 9
    empty = torch.nested.nested_tensor_from_jagged(torch.zeros(0, 2), torch.zeros(1, dtype=int))
    with make_buffer(encode=None, decode=lambda stored: stored) as buffer:
        batch = empty, torch.zeros(0, dtype=torch.int64)
        assert buffer.update(batch)[0].size(0) == 0


def test_a_refused_first_mini_batch_says_nothing_of_what_is_trained_on() -> None:
    images, labels = torch.zeros(4, 2), torch.arange(4)
    with RehearsalBuffer(9, num_representatives=2, decode=lambda stored: stored) as buffer:
        with pytest.raises(ValueError, match="samples"):
            buffer.update((images[:3], labels, images))
        buffer.draw()
        buffer.offer((images, labels, images))
        assert len(buffer.update((images, labels, images))[0]) == 6


def test_what_is_trained_on_may_not_count_places_either() -> None:
    batch = {"box": torch.zeros(4, 5), "label": torch.arange(4), "batch_idx": torch.arange(4)}
    with (
        RehearsalBuffer(
            9,
            num_representatives=2,
            label="label",
            encode=lambda batch: {"box": batch["box"], "label": batch["label"]},
            decode=lambda stored: {**stored, "batch_idx": torch.arange(len(stored["label"]))},
        ) as buffer,
        pytest.raises(ValueError, match="batch_idx"),
    ):
        buffer.update(batch)


def test_a_decode_that_uses_the_buffer_does_not_end_it() -> None:
    buffers = list[RehearsalBuffer]()

    def decode(stored: tuple[Any, Tensor]) -> Batch:
        for buffer in buffers:
            len(buffer)  # waits for the round that has called it
        return trained_on(stored)

    with make_buffer(decode=decode) as buffer, make_buffer() as other:
        assert train(buffer, 0, range(3)) == train(other, 0, range(3))
        buffers.append(buffer)
        assert train(buffer, 0, range(3, 8)) == train(other, 0, range(3, 8))


def test_fields_and_distances_are_those_of_the_form_that_is_trained_on() -> None:
    def store(batch: Batch) -> dict[str, Tensor]:
        return {"number": batch["pixels"][:, 0, 0].long(), "label": batch["label"]}

    def restore(stored: dict[str, Tensor]) -> Batch:
        return {"pixels": pixels_of(stored["number"]), "label": stored["label"]}

    with RehearsalBuffer(
        20, num_representatives=2, label="label", sampling="grasp", encode=store, decode=restore
    ) as buffer:
        for step in range(6):
            batch = mini_batch(step)
            del batch["file"]
            joined = buffer.update(batch)
        assert torch.equal(joined["pixels"], pixels_of(joined["pixels"][:, 0, 0].long()))
        buffer.measure_distances(lambda batch: batch["pixels"].flatten(1)[:, :2] + 1)
        buffer.rewrite(lambda batch: batch["pixels"][:, 0, 0].long() + 500, fields="number")
        held = torch.cat([batch["pixels"] for batch in buffer.representatives()])
        assert (held[:, 0, 0] >= 500).all()


def test_what_was_drawn_waits_until_it_can_be_decoded() -> None:
    is_broken = False

    def decode(stored: tuple[Any, Tensor]) -> Batch:
        if is_broken:
            raise OSError("no codec")
        return trained_on(stored)

    with make_buffer(decode=decode) as buffer, make_buffer() as other:
        assert train(buffer, 0, range(5)) == train(other, 0, range(5))
        len(buffer)
        is_broken = True
        train(other, 0, range(5, 6))
        check(buffer.update(mini_batch(5, 0, 8)))  # decoded before
        for _ in range(2):
            with pytest.raises(OSError, match="no codec"):
                buffer.update(mini_batch(6))
        is_broken = False
        assert train(buffer, 0, range(6, 9)) == train(other, 0, range(6, 9))


def test_one_function_alone() -> None:
    """Representatives may be made anew without being stored otherwise, and the other way round."""
    images, labels = torch.arange(10.0)[:, None], torch.arange(10) % 2
    with RehearsalBuffer(
        10, num_representatives=3, decode=lambda stored: (-stored[0], stored[1])
    ) as buffer:
        buffer.update((images, labels))
        joined, _ = buffer.update((images, labels))
        assert (joined[10:] <= 0).all()
    with RehearsalBuffer(
        10, num_representatives=3, encode=lambda batch: (batch[0].half(), batch[1])
    ) as buffer:
        buffer.draw()
        buffer.offer((images, labels))
        drawn = buffer.draw()
        assert drawn is not None
        assert drawn[0].dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"encode": "jpeg"}, TypeError, "encode='jpeg': it must be a function of a mini-batch"),
        ({"decode": 3}, TypeError, "decode=3: it must be a function"),
        (
            {"encode": lambda batch: (batch["file"][:2], batch["label"][:2])},
            ValueError,
            "encode gave 2 samples for a mini-batch of 5: it must give as many",
        ),
        (
            {"encode": lambda batch: batch["name"]},
            KeyError,
            "name",
        ),
        (
            {"decode": lambda stored: {**trained_on(stored), "label": stored[1].int()}},
            ValueError,
            r"decode must give representatives like the mini-batch that they join: .*'label'\] is "
            r"torch.int32",
        ),
        (
            {"decode": lambda stored: trained_on((stored[0][1:], stored[1][1:]))},
            ValueError,
            "decode gave 3 samples for 4 representatives: it must give as many",
        ),
        (
            {"decode": lambda stored: {**trained_on(stored), "file": [b"a"] * len(stored[1])}},
            ValueError,
            r"decode must give .*\['file'\]\[0\] is torch.uint8 \[1\], but the first mini-batch held",
        ),
        (
            {"decode": lambda stored: {"pixels": stored[1]}},
            ValueError,
            r"decode must give representatives like .* has \['pixels'\]",
        ),
        ({"decode": None}, ValueError, "without decode, update joins what is stored, which must"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), make_buffer(**arguments) as buffer:
        for step in range(3):
            buffer.update(mini_batch(step))


def test_bytes_are_no_tensors_of_bytes() -> None:
    files = [torch.zeros(3, dtype=torch.uint8)] * 2, torch.arange(2)
    with (
        RehearsalBuffer(
            9,
            num_representatives=1,
            capacity_bytes=9000,
            decode=lambda stored: ([bytes(each) for each in stored[0]], stored[1]),
        ) as buffer,
        pytest.raises(TypeError, match=r"batch\[0\] is a list of bytes, and there a list"),
    ):
        for _ in range(2):
            buffer.update(files)


def test_a_refused_mini_batch_changes_nothing() -> None:
    with make_buffer() as buffer, make_buffer() as other:
        assert train(buffer, 0, range(5)) == train(other, 0, range(5))
        wrong = mini_batch(5)
        wrong["pixels"] = wrong["pixels"].double()
        with pytest.raises(ValueError, match=r"\['pixels'\] is torch.float64"):
            buffer.update(wrong)
        assert train(buffer, 0, range(5, 9)) == train(other, 0, range(5, 9))
