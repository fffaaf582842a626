"""For tests: ranks as threads or processes, checks of buffers and transports, statistics."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ritornello.buffer import RehearsalBuffer
from ritornello.errors import BufferClosedError, PeerLostError
from ritornello.policies.protection import is_protected
from ritornello.policies.sampling import UniformSampling
from ritornello.records.paged import PagedShard
from ritornello.records.storage import Storage
from ritornello.rounds.planner import plan_draw
from ritornello.rounds.random_streams import Purpose, stream
from ritornello.rounds.round import Rounds
from ritornello.transports.base import Transport
from ritornello.transports.collective import CollectiveTransport
from ritornello.transports.local import LocalTransport
from ritornello.transports.shared_memory import SharedMemoryTransport

Result = TypeVar("Result")


def run_ranks(
    transports: Sequence[Transport], rank_main: Callable[[Transport], Result], seconds: float = 60.0
) -> list[Result]:
    """Plays ranks as threads of this process; each gets its transport.

    Returns:
        What ``rank_main`` returned on each rank.

    Raises:
        BaseException: the first rank's error, the other ranks' as notes.
        TimeoutError: a rank has not ended within ``seconds``.
    """
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def play(transport: Transport) -> None:
        try:
            results[transport.rank] = rank_main(transport)
        except BaseException as error:
            errors[transport.rank] = error

    threads = [threading.Thread(target=play, args=(each,), daemon=True) for each in transports]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        first, *others = sorted(errors)
        for rank in others:
            errors[first].add_note(f"rank {rank} raised {errors[rank]!r}")
        raise errors[first]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"not all ranks ended within {seconds:g} s")
    return [results[transport.rank] for transport in transports]


def connect_collective(num_ranks: int, timeout_seconds: float = 60.0) -> list[CollectiveTransport]:
    """Collective transports over gloo for ranks that are threads of this process."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def connect(end: Transport) -> CollectiveTransport:
        group = dist.ProcessGroupGloo(
            store, end.rank, num_ranks, timedelta(seconds=timeout_seconds)
        )
        return CollectiveTransport(group, end.rank, num_ranks, timeout_seconds, store=store)

    return run_ranks(LocalTransport.connect(num_ranks), connect)


def connect_shared_memory(
    num_ranks: int, timeout_seconds: float = 60.0, hosts: Sequence[int] | None = None
) -> list[SharedMemoryTransport]:
    """Shared-memory transports for ranks that are threads of this process.

    Args:
        num_ranks: how many.
        timeout_seconds: how long a peer may be silent.
        hosts: a number for each rank, equal where they are to share memory; None: all do.
    """
    ends = connect_collective(num_ranks, timeout_seconds)
    return run_ranks(ends, lambda end: SharedMemoryTransport(end, hosts))


def spawn_ranks(
    num_ranks: int,
    rank_main: Callable[..., Result],
    *args: Any,
    seconds: float = 100.0,
    fresh: bool = False,
) -> list[Result | BaseException | int | None]:
    """Runs ranks as real processes with a gloo group over loopback.

    Where the system can, they are forked from a process that has imported PyTorch, so that they
    begin at once. Their environment is the one at the first call.

    Args:
        num_ranks: how many.
        rank_main: a module-level function, called as ``rank_main(rank, *args)``.
        args: must pickle.
        seconds: after which what still runs is killed.
        fresh: whether each is an interpreter of its own, that begins and ends as one does; a forked
            one ends at once, without what Python does at its exit.

    Returns:
        For each rank: what ``rank_main`` returned or raised, or, if the process died without
        either, its exit code; None if it had to be killed.
    """
    context: Any = mp.get_context("spawn")
    if (
        not fresh and "forkserver" in mp.get_all_start_methods()
    ):  # ranks begin with all of this imported
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    outcomes: list[Any] = [None] * num_ranks
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(
                target=_spawned, args=(rank, num_ranks, folder, sending, rank_main, args)
            )
            process.start()
            sending.close()
            pipes.append(receiving)
            processes.append(process)
        deadline = time.monotonic() + seconds
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            try:
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                process.join(5.0)
                outcomes[rank] = process.exitcode
        for pipe, process in zip(pipes, processes, strict=True):
            process.join(max(1.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
            pipe.close()
    return outcomes


def _spawned(
    rank: int, num_ranks: int, folder: str, pipe: Any, rank_main: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
    )
    try:
        outcome = rank_main(rank, *args)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        outcome = error
    # Plain pickle: multiprocessing's would share tensors with a process that soon ends.
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    dist.destroy_process_group()


def check_consistent(buffer: RehearsalBuffer) -> None:
    """Checks that what a buffer knows of this rank's shard is what lies there.

    Compares what the selection policy knows (which slots each class has), the records of the shard
    (their labels, their rounds), and the contents that all ranks know (sizes, and for a sampling
    policy that wants to know it who lies where). Waits for the running round; involves no other
    rank, and changes nothing.

    Raises:
        AssertionError: says what disagrees.
    """
    buffer._steps.settle()
    rounds, num_offers = buffer._steps.rounds, buffer._steps.num_offers
    assert rounds.num_rounds == num_offers, (
        f"{num_offers} mini-batches were offered, but there were {rounds.num_rounds} rounds"
    )
    sizes, limits = rounds.contents.sizes.tolist(), rounds.limits.tolist()
    assert all(0 <= size <= limit for size, limit in zip(sizes, limits, strict=True)), (
        f"the shards hold {sizes}, but have room for {limits}"
    )
    admitted_in = rounds.admitted_in[: rounds.num_held].tolist()
    assert all(0 <= number < rounds.num_rounds for number in admitted_in), (
        f"after {rounds.num_rounds} rounds some were admitted in the rounds {admitted_in}"
    )
    if rounds.paged is not None:
        _check_pages(rounds, rounds.paged)
    labels = rounds.labels()
    for who, known in _labels_known(rounds):
        assert np.array_equal(known, labels), (
            f"slots hold the labels {labels.tolist()}, but according to {who} {known.tolist()}"
        )


def _check_pages(rounds: Rounds, paged: PagedShard) -> None:
    """Policy, table and rows say the same of the pages, and none is of two representatives."""
    state, slots = rounds.selection.state(), np.arange(rounds.num_held)
    counts, rows = paged.pages.counts, paged.shard.rows[: rounds.num_held]
    by_policy = np.zeros(rounds.num_held, dtype=np.int64)
    by_policy[state["slots"]] = state["pages"]
    assert np.array_equal(by_policy, counts[slots]), "the selection policy knows other pages"
    assert np.array_equal(paged.pages_of(rows), counts[slots]), "rows and table disagree"
    assert counts.sum() == counts[slots].sum() == paged.pages.num_used, "unused slots have pages"
    numbers = paged.pages.of_slots(slots)
    assert len(np.unique(numbers)) == len(numbers), "a page is of two representatives"


def _labels_known(rounds: Rounds) -> Iterator[tuple[str, np.ndarray]]:
    """Who knows what is in the slots of the shard: labels by slot."""
    with contextlib.suppress(TypeError):  # a policy of one's own that cannot be saved
        state = rounds.selection.state()
        with _contradicts_nothing("the selection policy"):
            rounds.new_selection(is_protected(state)).restore(state, rounds.num_held)
        if {"labels", "counts", "slots"} <= state.keys():
            known = np.zeros(rounds.num_held, dtype=np.int64)
            known[state["slots"]] = np.repeat(state["labels"], state["counts"])
            yield "the selection policy", known
    if rounds.contents.knows_places:
        again = rounds.no_contents()
        again.resize(rounds.contents.sizes)
        with _contradicts_nothing("the contents"):
            again.restore(rounds.contents.state())
        if rounds.contents.knows_labels:
            yield "the contents", _of_rank(rounds, rounds.contents.labels)
            yield "the classes of the contents", _of_rank(rounds, again.labels)
        if remembered := rounds.sampling.state():
            with _contradicts_nothing("the sampling policy"):
                rounds.new_sampling().restore(remembered)


@contextlib.contextmanager
def _contradicts_nothing(who: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise AssertionError(f"{who} contradicts the shard, or itself: {error}") from error


def _of_rank(rounds: Rounds, labels: np.ndarray) -> np.ndarray:
    """This rank's part of the labels by global index."""
    first = int(rounds.contents.sizes[: rounds.transport.rank].sum())
    return labels[first : first + rounds.num_held]


def chi_square_p_value(observed: np.ndarray, expected: np.ndarray | float) -> float:
    """How probable counts at least this far from the expected ones are, by chance alone.

    Args:
        observed: counts.
        expected: of each; all at least about 5. Degrees of freedom are one less than counts.
    """
    observed = np.asarray(observed, dtype=np.float64)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = torch.tensor((observed.size - 1) / 2, dtype=torch.float64)
    half = torch.tensor(statistic / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, half))


class TransportConformance:
    """What every transport must do. Subclass it in a test module and give ``connect``."""

    def connect(self, num_ranks: int, timeout_seconds: float) -> Sequence[Transport]:
        """Connected transports for ranks that are threads of this process."""
        raise AttributeError(
            f"{type(self).__name__} must define connect(num_ranks, timeout_seconds)"
        )

    def test_all_gather_gives_everybody_everything(self) -> None:
        """Values arrive in the order of the ranks, several times in a row."""

        def rank_main(transport: Transport) -> list[np.ndarray]:
            return [
                transport.all_gather(np.array([transport.rank, turn, -(2**40)]))
                for turn in range(5)
            ]

        for gathered in self._play(3, rank_main):
            for turn, values in enumerate(gathered):
                assert values.tolist() == [[rank, turn, -(2**40)] for rank in range(3)]

    def test_exchange_follows_the_plan(self) -> None:
        """Every record is that of the planned owner and slot, shards unequally filled."""
        for sizes in ([5], [8, 3], [0, 40, 1], [30, 6, 12, 2]):
            self._play(len(sizes), partial(self._exchange_rounds, sizes=sizes))

    def test_exchange_of_large_records(self) -> None:
        """Records of a quarter of a megabyte."""
        for sizes in ([9, 20], [5, 0, 7, 3]):
            exchange = partial(self._exchange_rounds, record_bytes=2**18, num_rounds=5)
            self._play(len(sizes), partial(exchange, sizes=sizes))

    def test_a_silent_peer_is_named_within_the_timeout(self) -> None:
        """A peer that does not come to an exchange."""

        def rank_main(transport: Transport) -> None:
            if transport.rank == 0:
                began = time.monotonic()
                lost: PeerLostError | None = None
                try:
                    self._exchange_rounds(transport, [0, 9], num_rounds=1)
                except PeerLostError as error:
                    lost = error
                assert lost is not None, "a silent peer went unnoticed"
                assert lost.peers == (1,), lost
                assert "rank 1" in str(lost), lost
                assert time.monotonic() - began < 3.0
            else:
                time.sleep(1.5)

        self._play(2, rank_main, timeout_seconds=0.5)

    def test_a_call_of_another_thread_can_be_interrupted(self) -> None:
        """It fails long before the timeout."""

        def rank_main(transport: Transport) -> None:
            if transport.rank == 1:
                time.sleep(1.0)
                return
            began = time.monotonic()
            interrupting = threading.Timer(0.2, transport.interrupt)
            interrupting.start()
            failed = False
            try:
                transport.all_gather(np.zeros(1, dtype=np.int64))
            except (PeerLostError, BufferClosedError):
                failed = True
            interrupting.join()
            assert failed, "it was not interrupted"
            assert time.monotonic() - began < 5.0

        self._play(2, rank_main)

    def test_close_twice(self) -> None:
        """Closing is idempotent."""

        def rank_main(transport: Transport) -> None:
            transport.all_gather(np.zeros(1, dtype=np.int64))
            transport.close()
            transport.close()

        self._play(2, rank_main)

    def _play(
        self,
        num_ranks: int,
        rank_main: Callable[[Transport], Result],
        timeout_seconds: float = 30.0,
    ) -> list[Result]:
        transports = self.connect(num_ranks, timeout_seconds)
        try:
            return run_ranks(transports, rank_main)
        finally:
            for transport in transports:
                transport.close()

    @staticmethod
    def _exchange_rounds(
        transport: Transport, sizes: list[int], record_bytes: int = 48, num_rounds: int = 20
    ) -> None:
        """Rounds in which each record says whose it is and in which slot."""
        rank = transport.rank
        rows_per_rank = np.maximum(1, sizes)
        shard = transport.make_shard(rows_per_rank, record_bytes, Storage.of("auto"))
        words = shard.rows.view(torch.int64)
        words[:] = (rank * 1000 + torch.arange(len(words)))[:, None]
        for number in range(num_rounds):
            generator = stream(7, Purpose.SAMPLING, number)
            plan = plan_draw(np.array(sizes), rank, 4, UniformSampling(), generator)
            out = torch.zeros((plan.num_drawn, record_bytes), dtype=torch.uint8)
            transport.await_readers()
            transport.exchange(shard, plan, out)
            owners = np.repeat(np.arange(len(sizes)), plan.receive_counts)
            expected = torch.from_numpy(owners * 1000 + plan.receive_slots)
            got = out.view(torch.int64)
            assert torch.equal(got, expected[:, None].expand_as(got))
