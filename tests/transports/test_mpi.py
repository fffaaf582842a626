"""The MPI transport: ranks are processes that mpiexec starts, see mpi_ranks.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import test_ragged
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport
from ritornello.transports.mpi import MpiTransport
from test_distributed_buffer import augmented_batches

SCRIPT = Path(__file__).with_name("mpi_ranks.py")
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIEXEC is None,
    reason="needs mpi4py and mpiexec: pip install mpi4py mpich",
)


@cache
def launcher() -> tuple[str, ...]:
    """The command mpiexec, so that it starts more ranks than there are cores."""
    assert MPIEXEC is not None
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, timeout=30)
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        return (MPIEXEC, "--oversubscribe", "--allow-run-as-root")
    return (MPIEXEC,)


def mpiexec(num_ranks: int, *command: object, seconds: int = 80) -> str:
    """Runs a command on all ranks over loopback; what they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "FI_TCP_IFACE": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_PORT": str(port),
        "MPIEXEC_TIMEOUT": str(seconds),  # then it ends all ranks itself
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launcher(), "-n", str(num_ranks), *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds + 20,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def play(num_ranks: int, scene: str, *arguments: object) -> None:
    # With -m mpi4py, an error on one rank ends all.
    mpiexec(num_ranks, sys.executable, "-m", "mpi4py", SCRIPT, scene, *arguments)


@needs_mpi
def test_the_contract_of_transports() -> None:
    play(4, "conformance")


@needs_mpi
def test_silence_is_noticed_without_keeping_a_core_busy() -> None:
    play(2, "silence")


@needs_mpi
def test_a_call_on_one_rank_is_noticed_at_once(tmp_path: Path) -> None:
    play(2, "parted", tmp_path / "save")


@needs_mpi
def test_what_is_refused() -> None:
    play(2, "refusals")


@needs_mpi
def test_the_process_group_must_have_the_ranks_of_the_mpi_job(tmp_path: Path) -> None:
    play(2, "groups", tmp_path)


@needs_mpi
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_buffer_gives_the_same_as_over_threads(num_ranks: int, tmp_path: Path) -> None:
    play(num_ranks, "buffer", tmp_path)
    expected = run_ranks(
        LocalTransport.connect(num_ranks), lambda end: augmented_batches(end, asynchronous=True)
    )
    for rank, batches in enumerate(expected):
        for asynchronous in (True, False):
            got = torch.load(tmp_path / f"{rank}-{asynchronous}.pt")
            assert len(got) == len(batches) > 100
            assert all(torch.equal(a, b) for a, b in zip(got, batches, strict=True))
    ragged = run_ranks(LocalTransport.connect(num_ranks), lambda end: test_ragged.play(end, True))
    for rank, seen in enumerate(ragged):
        assert torch.load(tmp_path / f"{rank}-ragged.pt") == seen


@needs_mpi
def test_threads_must_be_allowed() -> None:
    code = (
        "import mpi4py; mpi4py.rc.threads = False\n"
        "from ritornello.transports.mpi import MpiTransport\n"
        "try: MpiTransport.beside(None, 1.0)\n"
        "except ValueError as error: print(error)"
    )
    assert "initialised without MPI.THREAD_MULTIPLE" in mpiexec(1, sys.executable, "-c", code)


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"pip install 'ritornello\[mpi\]'"):
        MpiTransport.beside(None, 1.0)


@needs_mpi
@pytest.mark.slow
def test_mpiexec_starts_a_training(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    folder = tmp_path / "output"
    command = (sys.executable, "-m", "ritornello.experiments.cli", "run", "digits")
    written = mpiexec(2, *command, "--epochs", 1, "--output", folder)
    assert "on 2 ranks" in written
    assert (folder / "results.json").exists()
