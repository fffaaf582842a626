"""Ranks: starts local ones, or joins those that torchrun, srun or mpirun has started."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from ritornello.errors import PeerLostError
from ritornello.experiments.ranks.interruption import SIGNALS, RunInterruptedError
from ritornello.experiments.ranks.progress import say
from ritornello.records import accelerators
from ritornello.transports.collective import backends_for

OTHERS_FIRST_SECONDS = 2.0
"""How long a rank that has lost another waits before it fails: the launcher shows the first error,
and that of the lost rank says why."""

START_METHOD = "spawn"
"""How local ranks start: each imports everything itself, with its own environment."""


class LaunchError(RuntimeError):
    """A rank failed; the others were ended.

    Attributes:
        signal_number: of the signal that this process got, if that is why.
    """

    def __init__(self, message: str, signal_number: int = 0) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclass(frozen=True)
class PlaceInJob:
    """A rank's place in a job that a launcher has started."""

    launcher: str
    rank: int
    num_ranks: int
    local_rank: int
    address: str
    port: int


def launch(
    num_ranks: int | None, target: Callable[..., Any], *arguments: Any, num_restarts: int = 0
) -> Any:
    """Calls ``target(*arguments)`` on every rank.

    Inside a job of torchrun, srun or mpirun this process is one rank of it. Otherwise starts
    ``num_ranks`` local processes with torch's elastic launcher; for one rank that is not
    restarted, none.

    Args:
        num_ranks: None: those of the job, else 1.
        target: a module-level function.
        arguments: must pickle.
        num_restarts: how often all ranks start again after one has failed; see ``restarted``.

    Returns:
        What rank 0's call returned, on the process that launched it (or on every rank of a
        joined job, its own).

    Raises:
        ValueError: ``num_ranks`` or ``num_restarts`` contradicts the job.
        LaunchError: a rank failed or was killed; no other rank is left behind.
        RunInterruptedError: the ranks raised it: they were asked to stop.
    """
    place = place_in_job(os.environ)
    num_in_all = num_ranks_in(place, num_ranks)
    if place is not None:
        if num_restarts:
            raise ValueError(
                f"--restarts {num_restarts}, but {place.launcher} has started the ranks: leave it "
                "out, and have the launcher start them again (torchrun: --max-restarts)"
            )
        return _join(place, target, *arguments)
    if num_in_all == 1 and not num_restarts:
        return target(*arguments)
    return _start(num_in_all, num_restarts, target, *arguments)


def num_ranks_in(place: PlaceInJob | None, num_ranks: int | None) -> int:
    """How many ranks there are in a job, or will be.

    Args:
        place: of this process in a job, if it is in one.
        num_ranks: that are wished.

    Raises:
        ValueError: the job has another number, or there can be no such number.
    """
    if num_ranks is not None and num_ranks < 1:
        raise ValueError(f"--ranks {num_ranks}: it must be at least 1")
    if place is None:
        return num_ranks or 1
    if num_ranks not in (None, place.num_ranks):
        raise ValueError(
            f"--ranks {num_ranks}, but {place.launcher} has started {place.num_ranks} "
            "rank(s): leave --ranks out, or start without a launcher"
        )
    return place.num_ranks


def restarted() -> bool:
    """Whether an elastic launcher, such as torchrun or this one, has started this rank again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def place_in_job(environment: Mapping[str, str]) -> PlaceInJob | None:
    """This process's place in a job of torchrun, srun or mpirun; None outside of one.

    Raises:
        ValueError: the ranks are on several hosts and nothing tells where rank 0 is.
    """

    def number(name: str, otherwise: int = 0) -> int:
        return int(environment.get(name, otherwise))

    address = environment.get("MASTER_ADDR")
    port = number("MASTER_PORT", 29500)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return PlaceInJob(
            "torchrun",
            number("RANK"),
            number("WORLD_SIZE"),
            number("LOCAL_RANK"),
            address or "127.0.0.1",
            port,
        )
    num_tasks = number("SLURM_STEP_NUM_TASKS") if "SLURM_PROCID" in environment else 0
    for rank, size, local_rank, local_size in (
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        # srun may set these too. With another size it started mpirun's daemons, not the ranks.
        if rank in environment and size in environment and number(size) != num_tasks:
            if address is None and number(local_size) != number(size):
                raise ValueError(
                    "mpirun has started ranks on several hosts: set MASTER_ADDR (and "
                    "MASTER_PORT) to the address of rank 0's host"
                )
            return PlaceInJob(
                "mpirun",
                number(rank),
                number(size),
                number(local_rank),
                address or "127.0.0.1",
                port,
            )
    if num_tasks:
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        return PlaceInJob(
            "srun",
            number("SLURM_PROCID"),
            num_tasks,
            number("SLURM_LOCALID"),
            address or _first_host(nodes),
            number("MASTER_PORT", 20000 + number("SLURM_JOB_ID") % 10000),
        )
    return None


def _first_host(nodes: str) -> str:
    """The first host of a SLURM node list such as ``node[03-07]``."""
    if not any(mark in nodes for mark in "[,"):
        return nodes or "127.0.0.1"
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]


def _join(place: PlaceInJob, target: Callable[..., Any], *arguments: Any) -> Any:
    """Runs ``target`` as one rank of a job."""
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.num_ranks),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    device = accelerators.use_number(place.local_rank) if accelerators.is_available() else None
    dist.init_process_group("gloo" if device is None else backends_for(device))
    try:
        return target(*arguments)
    finally:
        dist.destroy_process_group()


def _start(num_ranks: int, num_restarts: int, target: Callable[..., Any], *arguments: Any) -> Any:
    """Starts local ranks and waits for them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    wanted = {
        # Ranks share the processors; without this each would take all of them.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)),
        # Else ranks that start again may find the addresses of those that died.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    # The launcher passes on to the ranks what it gets; of itself it would not know this one.
    before = signal.signal(signal.SIGUSR1, _pass_on) if _is_main_thread() else None
    # The launcher's log repeats, at length, what LaunchError says; this process only waits.
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=num_restarts,
        monitor_interval=0.1,
        start_method=START_METHOD,
    )
    try:
        return elastic_launch(config, _started)(target, *arguments)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in [128 + number for number in SIGNALS]:
            raise RunInterruptedError(failure.exitcode - 128, "all ranks were ended") from None
        if failure.exitcode < 0:
            reason = f"was killed (signal {-failure.exitcode})"
        else:
            reason = f"failed: {_reason(failure.message)}"
        raise LaunchError(f"rank {rank} {reason}; the other ranks were ended") from error
    except SignalException as error:
        message = f"stopped by {error.sigval.name}; all ranks were ended"
        raise LaunchError(message, error.sigval) from None
    finally:
        logging.disable(disabled)
        if before is not None:
            signal.signal(signal.SIGUSR1, before)
        for name in added:
            del os.environ[name]


def _started(target: Callable[..., Any], *arguments: Any) -> Any:
    """The main function of a local rank."""
    from torch.distributed.elastic.multiprocessing.errors import record

    # The launcher says that it was interrupted; a rank just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    @record
    def main() -> Any:
        place = place_in_job(os.environ)
        assert place is not None
        try:
            return _join(place, target, *arguments)
        except RunInterruptedError as end:
            if place.rank == 0:
                say(str(end))
            status = end.status
        except PeerLostError:
            time.sleep(OTHERS_FIRST_SECONDS)
            raise
        # Not before the error is gone: it holds what must not outlive the interpreter.
        sys.exit(status)

    return main()


def _pass_on(number: int, frame: FrameType | None) -> NoReturn:
    """Has the launcher send a signal to the ranks, and wait for their end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException(f"signal {number}", signal.Signals(number))


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _reason(message: Any) -> str:
    """The last line of a rank's report."""
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    return text.strip().splitlines()[-1] if text.strip() else "see its output above"
